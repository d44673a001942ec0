//! Copying out of a map, and telling the processor early what will be copied.

/// Bytes of a processor's cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;
/// Lines to ask for early: enough for the processor to see where the copy goes, and for its
/// translation to be found.
#[cfg(target_arch = "x86_64")]
const LINES_AHEAD: usize = 8;

/// Copies `len` bytes.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, and they must not overlap.
/// Others may change both meanwhile.
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: contract of this function.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// Has the beginning of what lies at `from` brought near. Never faults: an address that is not mapped
/// is ignored.
#[inline]
pub(super) fn prefetch(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..LINES_AHEAD {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint without effect on what the program sees, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line * LINE).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

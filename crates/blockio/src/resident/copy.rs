//! Copying out of a map, and telling the processor early what will be copied.

/// Bytes of a processor's cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;
/// Lines to ask for early: enough for the processor to see where the copy goes, and for its
/// translation to be found.
#[cfg(target_arch = "x86_64")]
const LINES_AHEAD: usize = 8;

/// Bytes of a page, and of what is copied of it at a time.
const PAGE: usize = 4096;
const PIECE: usize = 64;
/// Pages that are copied side by side: the processor fetches ahead within a page, and for several
/// pages at a time.
const ABREAST: usize = 4;

/// Copies `len` bytes.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, and they must not overlap.
/// Others may change both meanwhile.
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len == PAGE && is_x86_feature_detected!("avx512f") {
        // SAFETY: the contract of this function; the processor has the instructions.
        return unsafe { copy_page(from, to) };
    }
    let abreast = len - len % (ABREAST * PAGE);
    for block in (0..abreast).step_by(ABREAST * PAGE) {
        // SAFETY: a part of what the contract of this function is about.
        unsafe { copy_abreast(from.wrapping_add(block), to.wrapping_add(block)) };
    }
    let (from, to) = (from.wrapping_add(abreast), to.wrapping_add(abreast));
    // SAFETY: the rest of it.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len - abreast) };
}

/// Copies a page, in the order in which it was [prefetched](prefetch). (What the C library has for that length begins
/// at both ends, or leaves it to microcode that begins late: both are slower by 4 to 12 % of a read.)
///
/// # Safety
/// As [`copy`], of [`PAGE`] bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn copy_page(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_storeu_si512};
    const STEP: usize = size_of::<__m512i>();
    for at in (0..PAGE).step_by(4 * STEP) {
        // So many loads before the first store.
        let parts = [0, 1, 2, 3].map(|part| {
            // SAFETY: a part of what the contract is about.
            unsafe { _mm512_loadu_si512(from.wrapping_add(at + part * STEP).cast()) }
        });
        for (place, part) in (at..).step_by(STEP).zip(parts) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(to.wrapping_add(place).cast(), part) };
        }
    }
}

/// Copies [`ABREAST`] pages.
///
/// # Safety
/// As [`copy`].
unsafe fn copy_abreast(from: *const u8, to: *mut u8) {
    for piece in (0..PAGE).step_by(PIECE) {
        for page in 0..ABREAST {
            let at = page * PAGE + piece;
            let (from, to) = (from.wrapping_add(at), to.wrapping_add(at));
            // SAFETY: a part of what the contract is about.
            unsafe { std::ptr::copy_nonoverlapping(from, to, PIECE) };
        }
    }
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

//! Copying out of a map and into it, and telling the processor early what will be copied.

use std::sync::atomic::{Ordering, fence};

use super::race::{Race, Way};

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
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len == PAGE {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the contract of this function; the processor has the instructions.
            return unsafe { copy_page_512(from, to) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { copy_page_256(from, to) };
        }
    }
    let abreast = len - len % (ABREAST * PAGE);
    if abreast > 0 {
        // SAFETY: a part of what the contract of this function is about.
        unsafe { copy_long(from, to, abreast) };
    }
    let (from, to) = (from.wrapping_add(abreast), to.wrapping_add(abreast));
    // SAFETY: the rest of it.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len - abreast) };
}

/// Copies so many times [`ABREAST`] pages, in the way that has turned out to be the faster one. (128 KiB out of the page cache:
/// side by side 11 us on Sapphire Rapids and 8 to 10 on AMD's family 26, by the processor's own copy 26, in `pread`, and 4; on
/// family 25 7.5 and 9 to 10.)
///
/// # Safety
/// As [`copy`].
unsafe fn copy_long(from: *const u8, to: *mut u8, len: usize) {
    thread_local! {
        static RACE: Race = const { Race::new() };
    }
    let copy = |way| match way {
        #[cfg(target_arch = "x86_64")]
        Way::First if is_x86_feature_detected!("avx2") => {
            // SAFETY: the contract; the processor has the instructions.
            unsafe { copy_abreast_256(from, to, len) };
        }
        // SAFETY: the contract.
        Way::First => unsafe { copy_abreast(from, to, len) },
        // SAFETY: the contract.
        Way::Second => unsafe { copy_at_once(from, to, len) },
    };
    RACE.with(|race| race.run(len, copy));
}

/// Copies with what the processor has for that.
///
/// # Safety
/// As [`copy`].
unsafe fn copy_at_once(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the contract; the direction flag is clear by the calling convention, and the registers are given back as the
    // instruction leaves them.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the contract.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, len)
    };
}

/// Copies a page, in the order in which it was [prefetched](prefetch). (What the C library has for that length begins
/// at both ends, or leaves it to microcode that begins late: both are slower by 4 to 14 % of a read.)
///
/// # Safety
/// As [`copy`], of [`PAGE`] bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn copy_page_512(from: *const u8, to: *mut u8) {
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

/// As [`copy_page_512`], for processors with narrower registers.
///
/// # Safety
/// As [`copy`], of [`PAGE`] bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_page_256(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_storeu_si256};
    const STEP: usize = size_of::<__m256i>();
    for at in (0..PAGE).step_by(8 * STEP) {
        let parts = [0, 1, 2, 3, 4, 5, 6, 7].map(|part| {
            // SAFETY: a part of what the contract is about.
            unsafe { _mm256_loadu_si256(from.wrapping_add(at + part * STEP).cast()) }
        });
        for (place, part) in (at..).step_by(STEP).zip(parts) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(to.wrapping_add(place).cast(), part) };
        }
    }
}

/// Copies [`ABREAST`] pages side by side, and the next ones, until `len` bytes are copied: a multiple of what so many pages have.
///
/// # Safety
/// As [`copy`].
#[inline(always)]
unsafe fn copy_abreast(from: *const u8, to: *mut u8, len: usize) {
    for block in (0..len).step_by(ABREAST * PAGE) {
        for piece in (0..PAGE).step_by(PIECE) {
            for page in 0..ABREAST {
                let at = block + page * PAGE + piece;
                let (from, to) = (from.wrapping_add(at), to.wrapping_add(at));
                // SAFETY: a part of what the contract is about.
                unsafe { std::ptr::copy_nonoverlapping(from, to, PIECE) };
            }
        }
    }
}

/// [`copy_abreast`] in half as many instructions, and a seventh less time on AMD's family 25.
///
/// # Safety
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_abreast_256(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the contract.
    unsafe { copy_abreast(from, to, len) };
}

/// Copies `len` bytes to where they will not be looked at soon: past the processor's caches where it can, which
/// halves the traffic, since what is overwritten need not be read. [`end_stores`] has to follow.
///
/// # Safety
/// As [`copy`].
#[inline]
pub(crate) unsafe fn store(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len >= PAGE && to.addr().is_multiple_of(LINE) {
        let lines = len - len % LINE;
        for at in (0..lines).step_by(LINE) {
            // SAFETY: a part of what the contract is about.
            unsafe { store_line(from.wrapping_add(at), to.wrapping_add(at)) };
        }
        let (from, to) = (from.wrapping_add(lines), to.wrapping_add(lines));
        // SAFETY: the rest of it.
        return unsafe { std::ptr::copy_nonoverlapping(from, to, len - lines) };
    }
    // SAFETY: the contract of this function.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// Copies a line of the cache.
///
/// # Safety
/// As [`copy`], of [`LINE`] bytes; `to` must be a multiple of that.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn store_line(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for at in (0..LINE).step_by(size_of::<__m128i>()) {
        // SAFETY: a part of what the contract is about; every x86-64 processor has the instruction.
        let part = unsafe { _mm_loadu_si128(from.wrapping_add(at).cast()) };
        // SAFETY: as above, and it is aligned.
        unsafe { _mm_stream_si128(to.wrapping_add(at).cast(), part) };
    }
}

/// Whoever sees what is written next sees what was [`store`]d; and what is read next is read after it was.
#[inline]
pub(crate) fn end_stores() {
    // Stronger than what other stores need: those past the caches are in no order.
    fence(Ordering::SeqCst);
}

/// Has the beginning of what lies at `from` brought near. Never faults: an address that is not mapped
/// is ignored.
#[inline]
pub(crate) fn prefetch(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..LINES_AHEAD {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint without effect on what the program sees, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line * LINE).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whichever way is on trial, all bytes are copied and no others.
    #[test]
    fn copies_of_all_lengths_have_what_is_to_be_copied_and_no_more() {
        let from: Vec<u8> = (0..40 * PAGE).map(|at| (at / 64 * 7 + at) as u8 | 1).collect();
        for len in [1, 512, PAGE, 3 * PAGE, 4 * PAGE, 7 * PAGE + 511, 32 * PAGE, 33 * PAGE + 1] {
            // More often than there are tries before a way is chosen.
            for start in 0..40 {
                let mut to = vec![0; start + len + 64];
                let target = to[start..].as_mut_ptr();
                // SAFETY: both have so many bytes, and don't overlap.
                unsafe { copy(from[start..].as_ptr(), target, len) };
                assert!(to[start..start + len] == from[start..start + len], "{len} bytes at {start}");
                assert!(
                    to[..start].iter().chain(&to[start + len..]).all(|byte| *byte == 0),
                    "{len}, {start}"
                );
            }
        }
    }

    /// Also those which this processor would not take.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn page_is_copied_whole_with_registers_of_either_width() {
        type Copy = unsafe fn(*const u8, *mut u8);
        let from: Vec<u8> = (0..2 * PAGE).map(|at| (at / 64 * 7 + at) as u8 | 1).collect();
        let ways: [(bool, Copy); 2] = [
            (is_x86_feature_detected!("avx2"), copy_page_256),
            (is_x86_feature_detected!("avx512f"), copy_page_512),
        ];
        for (_, copy) in ways.into_iter().filter(|(known, _)| *known) {
            for start in [0, 1, 64] {
                let mut to = vec![0; 2 * PAGE];
                // SAFETY: both have a page there, and don't overlap; the processor has the instructions.
                unsafe { copy(from[start..].as_ptr(), to[start..].as_mut_ptr()) };
                assert!(to[start..start + PAGE] == from[start..start + PAGE]);
                assert!(to[..start].iter().chain(&to[start + PAGE..]).all(|byte| *byte == 0));
            }
        }
    }
}

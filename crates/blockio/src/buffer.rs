//! Memory that I/O goes to and comes from: aligned heap memory, and memory of a guest.
//!
//! Guest memory is shared with a guest that may change it at any moment. It is never turned into
//! a Rust reference: it is handed to the kernel as addresses, or copied through raw pointers.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    any::Any,
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::Arc,
};

/// Alignment of [`AlignedBuf`] in bytes: enough for direct I/O on every device with blocks up to it.
pub const BUF_ALIGNMENT: usize = 4096;

/// Heap memory aligned to 4096 bytes, all zeros at first.
pub struct AlignedBuf {
    memory: NonNull<u8>,
    len: usize,
}

impl AlignedBuf {
    /// Allocates `len` zero bytes. Aborts like `Vec` if there is no memory.
    pub fn new_zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        match NonNull::new(memory) {
            Some(memory) => Self { memory, len },
            None => handle_alloc_error(layout),
        }
    }

    fn layout(len: usize) -> Layout {
        match Layout::from_size_align(len.max(1), BUF_ALIGNMENT) {
            Ok(layout) => layout,
            Err(_) => handle_alloc_error(Layout::new::<u8>()),
        }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new_zeroed` with the layout of the same length.
        unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.len)) };
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this buffer owns.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes that this buffer owns, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish()
    }
}

// SAFETY: owns its memory like a `Vec<u8>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

/// One piece of memory, laid out as the kernel's `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IoVec {
    /// Address of the first byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: only an address and a length; who dereferences it vouches for it.
unsafe impl Send for IoVec {}
// SAFETY: as above.
unsafe impl Sync for IoVec {}

impl IoVec {
    const EMPTY: IoVec = IoVec { base: std::ptr::null_mut(), len: 0 };

    /// The piece without its first `bytes` bytes (none left if it is not longer).
    pub(crate) fn skip(self, bytes: usize) -> IoVec {
        let bytes = bytes.min(self.len);
        IoVec { base: self.base.wrapping_add(bytes), len: self.len - bytes }
    }

    /// The piece's first `bytes` bytes.
    pub(crate) fn take(self, bytes: usize) -> IoVec {
        IoVec { base: self.base, len: self.len.min(bytes) }
    }
}

/// How many pieces a [`GuestBuf`] holds without memory of its own on the heap.
const INLINE_PARTS: usize = 4;

#[derive(Clone)]
enum Parts {
    Inline { parts: [IoVec; INLINE_PARTS], count: u8 },
    Heap(Vec<IoVec>),
}

impl Parts {
    fn as_slice(&self) -> &[IoVec] {
        match self {
            Parts::Inline { parts, count } => parts.get(..usize::from(*count)).unwrap_or_default(),
            Parts::Heap(parts) => parts,
        }
    }

    fn push(&mut self, part: IoVec) {
        match self {
            Parts::Inline { parts, count } => match parts.get_mut(usize::from(*count)) {
                Some(slot) => {
                    *slot = part;
                    *count += 1;
                }
                None => {
                    let mut heap = Vec::with_capacity(INLINE_PARTS * 4);
                    heap.extend_from_slice(parts);
                    heap.push(part);
                    *self = Parts::Heap(heap);
                }
            },
            Parts::Heap(parts) => parts.push(part),
        }
    }
}

/// Memory of a guest as a list of pieces, and a guard that keeps it mapped.
#[derive(Clone)]
pub struct GuestBuf {
    parts: Parts,
    len: usize,
    keep: Arc<dyn Any + Send + Sync>,
}

impl GuestBuf {
    /// A buffer of `parts`, in this order; empty ones are left out.
    ///
    /// # Safety
    /// Every part must be valid for reads and writes, from any thread, for as long as `keep` lives
    /// (that somebody else changes the bytes meanwhile is accepted). The sum of the lengths must
    /// not overflow `usize`.
    pub unsafe fn new(parts: impl IntoIterator<Item = IoVec>, keep: Arc<dyn Any + Send + Sync>) -> GuestBuf {
        Self::collect(parts, keep)
    }

    /// A buffer of `len` zero bytes on the heap, shared by its clones and slices as guest memory is.
    pub fn zeroed(len: usize) -> GuestBuf {
        let mut memory = AlignedBuf::new_zeroed(len);
        let part = IoVec { base: memory.as_mut_ptr(), len };
        // The buffer is never used through its own reference again: it only keeps the memory.
        Self::collect([part], Arc::new(memory))
    }

    fn collect(parts: impl IntoIterator<Item = IoVec>, keep: Arc<dyn Any + Send + Sync>) -> GuestBuf {
        let mut buf =
            GuestBuf { parts: Parts::Inline { parts: [IoVec::EMPTY; INLINE_PARTS], count: 0 }, len: 0, keep };
        for part in parts {
            if part.len > 0 {
                buf.len = buf.len.saturating_add(part.len);
                buf.parts.push(part);
            }
        }
        buf
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces; none is empty.
    pub fn parts(&self) -> &[IoVec] {
        self.parts.as_slice()
    }

    /// The buffer as borrowed memory.
    pub fn view(&self) -> GuestView<'_> {
        GuestView { parts: self.parts(), len: self.len, keep: &self.keep }
    }

    /// The part of `len` bytes from `offset` on; `None` if the buffer ends before.
    pub fn slice(&self, offset: usize, len: usize) -> Option<GuestBuf> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| Self::collect(self.pieces(offset, len), self.keep.clone()))
    }

    /// Copies from `offset` on into `to`; returns how many bytes there were to copy.
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces(offset, to.len()) {
            if let Some(target) = to.get_mut(done..done + piece.len) {
                // SAFETY: the piece is valid (contract of `new`); `target` is as long, and ours.
                unsafe { std::ptr::copy(piece.base, target.as_mut_ptr(), piece.len) };
                done += piece.len;
            }
        }
        done
    }

    /// Copies `from` into the buffer from `offset` on; returns how many bytes had room.
    pub fn copy_in(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces(offset, from.len()) {
            if let Some(source) = from.get(done..done + piece.len) {
                // SAFETY: the piece is valid (contract of `new`); `source` is as long.
                unsafe { std::ptr::copy(source.as_ptr(), piece.base, piece.len) };
                done += piece.len;
            }
        }
        done
    }

    /// Fills up to `len` bytes from `offset` on with zeros; returns how many.
    pub fn fill_zero(&self, offset: usize, len: usize) -> usize {
        let mut done = 0;
        for piece in self.pieces(offset, len) {
            // SAFETY: the piece is valid (contract of `new`).
            unsafe { std::ptr::write_bytes(piece.base, 0, piece.len) };
            done += piece.len;
        }
        done
    }

    /// The pieces of the `len` bytes from `offset` on, as far as there are any.
    pub(crate) fn pieces(&self, offset: usize, len: usize) -> impl Iterator<Item = IoVec> + '_ {
        let (mut skip, mut left) = (offset, len);
        self.parts().iter().filter_map(move |part| {
            let rest = part.skip(skip);
            skip -= part.len - rest.len;
            let piece = rest.take(left);
            left -= piece.len;
            (piece.len > 0).then_some(piece)
        })
    }
}

impl fmt::Debug for GuestBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestBuf").field("len", &self.len).field("parts", &self.parts().len()).finish()
    }
}

/// Borrowed memory of a guest as a list of pieces: what a [`GuestBuf`] is before it has to outlive the caller.
/// Making one neither allocates nor counts references.
#[derive(Clone, Copy)]
pub struct GuestView<'a> {
    parts: &'a [IoVec],
    len: usize,
    keep: &'a Arc<dyn Any + Send + Sync>,
}

impl<'a> GuestView<'a> {
    /// A view of `parts`, in this order.
    ///
    /// # Safety
    /// As for [`GuestBuf::new`].
    pub unsafe fn new(parts: &'a [IoVec], keep: &'a Arc<dyn Any + Send + Sync>) -> Self {
        let len = parts.iter().fold(0, |len: usize, part| len.saturating_add(part.len));
        Self { parts, len, keep }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn parts(&self) -> &'a [IoVec] {
        self.parts
    }

    /// The same memory, kept for as long as the buffer lives.
    pub fn to_buf(&self) -> GuestBuf {
        GuestBuf::collect(self.parts.iter().copied(), Arc::clone(self.keep))
    }
}

impl fmt::Debug for GuestView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestView").field("len", &self.len).field("parts", &self.parts.len()).finish()
    }
}

/// Memory of one operation; the engine owns it until the operation is complete.
#[derive(Debug)]
pub enum Buffer {
    /// Memory of ours.
    Owned(AlignedBuf),
    /// Memory of a guest.
    Guest(GuestBuf),
}

impl Buffer {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Buffer::Owned(buf) => buf.len(),
            Buffer::Guest(buf) => buf.len(),
        }
    }

    /// Whether there is not a byte in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies from `offset` on into `to`; returns how many bytes there were to copy.
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) -> usize {
        match self {
            Buffer::Owned(buf) => copy_common(to, buf.get(offset..).unwrap_or_default()),
            Buffer::Guest(buf) => buf.copy_out(offset, to),
        }
    }

    /// Copies `from` into the buffer from `offset` on; returns how many bytes had room.
    pub fn copy_in(&mut self, offset: usize, from: &[u8]) -> usize {
        match self {
            Buffer::Owned(buf) => copy_common(buf.get_mut(offset..).unwrap_or_default(), from),
            Buffer::Guest(buf) => buf.copy_in(offset, from),
        }
    }
}

fn copy_common(to: &mut [u8], from: &[u8]) -> usize {
    let len = to.len().min(from.len());
    if let (Some(to), Some(from)) = (to.get_mut(..len), from.get(..len)) {
        to.copy_from_slice(from);
    }
    len
}

impl From<AlignedBuf> for Buffer {
    fn from(buf: AlignedBuf) -> Self {
        Buffer::Owned(buf)
    }
}

impl From<GuestBuf> for Buffer {
    fn from(buf: GuestBuf) -> Self {
        Buffer::Guest(buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(lens: &[usize]) -> (Arc<Vec<AlignedBuf>>, GuestBuf) {
        let mut memory: Vec<AlignedBuf> = lens.iter().map(|len| AlignedBuf::new_zeroed(*len)).collect();
        let parts: Vec<IoVec> =
            memory.iter_mut().map(|buf| IoVec { base: buf.as_mut_ptr(), len: buf.len() }).collect();
        let memory = Arc::new(memory);
        // SAFETY: the parts point into buffers that `memory` owns.
        let buf = unsafe { GuestBuf::new(parts, memory.clone()) };
        (memory, buf)
    }

    #[test]
    fn aligned_buf_of_any_length_is_aligned_and_zero() {
        for len in [0, 1, 512, 4096, 70_000] {
            let mut buf = AlignedBuf::new_zeroed(len);
            assert_eq!(buf.as_ptr() as usize % BUF_ALIGNMENT, 0);
            assert!(buf.len() == len && buf.iter().all(|byte| *byte == 0));
            buf.fill(7);
            assert!(buf.iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn guest_buf_of_many_parts_copies_across_their_borders() {
        for lens in [&[1, 0, 3, 7][..], &[5; 9], &[3, 4096, 1, 1, 1, 500]] {
            let (_memory, buf) = guest(lens);
            let total: usize = lens.iter().sum();
            assert_eq!(buf.len(), total);
            let data: Vec<u8> = (0..total).map(|n| n as u8 ^ 0x5a).collect();
            assert_eq!(buf.copy_in(0, &data), total);
            for offset in 0..=total {
                let mut out = vec![0; total];
                assert_eq!(buf.copy_out(offset, &mut out), total - offset);
                assert_eq!(out[..total - offset], data[offset..]);
            }
            let part = buf.slice(1, total - 2).unwrap();
            let mut out = vec![0; total - 2];
            assert_eq!(part.copy_out(0, &mut out), total - 2);
            assert_eq!(out, data[1..total - 1]);
            assert_eq!(buf.fill_zero(2, 2), 2);
            let mut out = vec![1; 4];
            buf.copy_out(1, &mut out);
            assert_eq!(out[1..3], [0, 0]);
        }
    }

    #[test]
    fn guest_buf_sliced_past_its_end_is_none() {
        let (_memory, buf) = guest(&[10, 10]);
        assert!(buf.slice(0, 21).is_none());
        assert!(buf.slice(usize::MAX, 2).is_none());
        assert!(buf.slice(20, 0).unwrap().is_empty());
        assert_eq!(buf.copy_in(15, &[0; 10]), 5);
        assert_eq!(buf.copy_in(30, &[0; 10]), 0);
    }

    #[test]
    fn guest_buf_slice_keeps_the_memory_alive() {
        let (memory, buf) = guest(&[8]);
        let part = buf.slice(4, 4).unwrap();
        drop(buf);
        assert_eq!(Arc::strong_count(&memory), 2);
        drop(part);
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}

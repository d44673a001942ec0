//! The `SIGBUS` guard: a copy out of a mapped file, or into it, that can't kill the process.
//!
//! Touching a page of a mapped file that can't be had (the file was cut, the device fails, the memory
//! is broken) raises `SIGBUS` on the very thread that touched it. So all that the handler has to know
//! is what its own thread is copying: a pointer in a thread-local variable, which points to what the
//! copying function has borrowed. There is no table, and no race with maps that come and go, whatever
//! other threads do.
//!
//! If the address lies in the map that is being copied from, the handler marks the map broken and
//! puts zeros (anonymous memory) in the file's place, for good: the copy goes on, and says at its
//! end that it was worth nothing. Other threads that copy from the same map, or into it, at the time may get
//! zeros or write there too; the mark was made before, so they see it at their end.
//! Every other `SIGBUS` goes to who handled it before.
//!
//! What the handler uses is safe in a signal handler: atomics, a thread-local that needs no set-up
//! and no destructor, `mmap`, `sigaction`, `raise`.

use std::{
    cell::Cell,
    ffi::{c_int, c_void},
    marker::PhantomData,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering, compiler_fence, fence},
    },
};

use rustix::mm::{MapFlags, ProtFlags};

use crate::clock::Epoch;

const PAGE_SIZE: usize = crate::coherence::PAGE_SIZE as usize;

/// Address space that a mapped file takes up, and whether it still is that file's.
#[derive(Debug)]
pub(crate) struct Guarded {
    start: usize,
    bytes: usize,
    access: ProtFlags,
    broken: AtomicBool,
}

impl Guarded {
    /// Of `bytes` bytes from `start` on, whole pages, for `access`.
    ///
    /// # Safety
    /// They must be a mapping that nobody has a reference into, and that stays until this is dropped.
    pub(crate) unsafe fn new(start: *mut c_void, bytes: usize, access: ProtFlags) -> Self {
        Self { start: start.expose_provenance(), bytes, access, broken: AtomicBool::new(false) }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Gives the map up.
    pub(crate) fn give_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Runs `copy`, which may touch the map; false if the map broke, before or meanwhile.
    pub(crate) fn copy(&self, copy: impl FnOnce()) -> bool {
        let copying = Copying::from(self);
        copy();
        drop(copying);
        // What the copy read was read before this: zeros that another thread's handler put there
        // come with its mark. (No more than that: a full barrier would wait for the copy's stores.)
        fence(Ordering::Acquire);
        !self.is_broken()
    }

    fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.start) < self.bytes
    }

    /// Puts zeros in the place of the file, all of it, or of the page at `address` only: memory that can be written
    /// counts for what may be had, and where all of it may not, what was there is gone on older kernels. False if that can't be
    /// done.
    fn isolate(&self, address: usize) -> bool {
        self.give_up();
        let (start, bytes) = match self.access.contains(ProtFlags::WRITE) {
            true => (address - address % PAGE_SIZE, PAGE_SIZE),
            false => (self.start, self.bytes),
        };
        let start = ptr::with_exposed_provenance_mut(start);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range is in a mapping of ours that nobody has a reference into (contract of `new`).
        unsafe { rustix::mm::mmap_anonymous(start, bytes, self.access, flags) }.is_ok()
    }
}

thread_local! {
    /// What this thread is copying from, null most of the time.
    static SOURCE: AtomicPtr<Guarded> = const { AtomicPtr::new(ptr::null_mut()) };
    /// The epoch in which this thread was last found fit to take a `SIGBUS`; 0: none.
    static FIT: Cell<u32> = const { Cell::new(0) };
}

/// While this lives, its thread may copy from a map.
struct Copying<'map>(PhantomData<&'map Guarded>);

impl<'map> From<&'map Guarded> for Copying<'map> {
    fn from(map: &'map Guarded) -> Self {
        debug_assert!(SOURCE.with(|source| source.load(Ordering::Relaxed).is_null()), "one copy in another");
        SOURCE.with(|source| source.store(ptr::from_ref(map).cast_mut(), Ordering::Relaxed));
        // Only this thread's handler looks at it: the compiler must keep the order, no more.
        compiler_fence(Ordering::SeqCst);
        Self(PhantomData)
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        SOURCE.with(|source| source.store(ptr::null_mut(), Ordering::Relaxed));
    }
}

/// Who handled `SIGBUS` before: a function's address, `SIG_DFL` or `SIG_IGN`.
static EARLIER: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static EARLIER_FLAGS: AtomicI32 = AtomicI32::new(0);

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// Installs the handler, once for the process. False if it is not there (any more).
pub(crate) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| replace_handler().is_some()) && is_installed()
}

/// Whether the calling thread would survive a `SIGBUS`; looked at once an epoch.
#[inline]
pub(crate) fn is_fit(epoch: Epoch) -> bool {
    FIT.with(|fit| {
        fit.get() == epoch.0 || {
            let survives = !is_blocked_here() && is_installed();
            fit.set(if survives { epoch.0 } else { 0 });
            survives
        }
    })
}

/// Whether `SIGBUS` still comes to our handler.
fn is_installed() -> bool {
    current_action().is_some_and(|action| action.sa_sigaction == on_sigbus as Handler as usize)
}

/// Whether `SIGBUS` is blocked on this thread: then a fault would kill the process at once.
fn is_blocked_here() -> bool {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: only asks; `set` has room for the answer.
    if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), set.as_mut_ptr()) } != 0 {
        return true;
    }
    // SAFETY: filled by the call above, which succeeded.
    unsafe { libc::sigismember(set.as_ptr(), libc::SIGBUS) != 0 }
}

fn current_action() -> Option<libc::sigaction> {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only asks; `action` has room for the answer.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), action.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: filled by the call above, which succeeded.
    Some(unsafe { action.assume_init() })
}

fn set_action(handler: usize, flags: c_int) -> Option<()> {
    // SAFETY: a C structure of numbers and pointers; all zeros is a valid one (no mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the handler is ours, which is safe to run at any time, or `SIG_DFL`.
    (unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } == 0).then_some(())
}

fn replace_handler() -> Option<()> {
    // Stored first: the handler may run as soon as it is installed.
    let earlier = current_action()?;
    EARLIER.store(earlier.sa_sigaction, Ordering::Relaxed);
    EARLIER_FLAGS.store(earlier.sa_flags, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    // On the alternate stack where a thread has one, as the runtime's own handler, which we may
    // have to call, expects.
    set_action(on_sigbus as Handler as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler that was installed with `SA_SIGINFO` a valid `siginfo_t`.
    let told = unsafe { &*info };
    let code = told.si_code;
    // A positive code: the kernel's, and for this signal with the address that was touched.
    if code > 0 {
        // SAFETY: as said.
        let address = unsafe { told.si_addr() }.addr();
        let source = SOURCE.with(|source| source.load(Ordering::Relaxed));
        // SAFETY: null, or what this very thread has borrowed while it is in `Guarded::copy`.
        let source = unsafe { source.as_ref() };
        if source.is_some_and(|map| map.contains(address) && map.isolate(address)) {
            return;
        }
    }
    pass_on(signal, code, info, context);
}

/// Does what would have happened without our handler.
fn pass_on(signal: c_int, code: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let earlier = EARLIER.load(Ordering::Relaxed);
    match earlier {
        // Sent by somebody, and to be ignored. (A fault can't be: the kernel kills.)
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // After a fault the access is repeated when we return, and kills.
            if set_action(libc::SIG_DFL, 0).is_none() {
                std::process::abort();
            }
            if code <= 0 {
                // SAFETY: always sound; it is blocked here, so it arrives when we return.
                unsafe { libc::raise(signal) };
            }
        }
        _ if EARLIER_FLAGS.load(Ordering::Relaxed) & libc::SA_SIGINFO != 0 => {
            // SAFETY: what was installed with `SA_SIGINFO` is such a function's address.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(earlier) };
            handler(signal, info, context);
        }
        _ => {
            // SAFETY: what was installed without `SA_SIGINFO` is such a function's address.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(earlier) };
            handler(signal);
        }
    }
}

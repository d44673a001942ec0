//! A tape, for tests: it is told of every I/O that a disk and its state see, in their order, and may
//! let any of them fail.
//!
//! Whoever does I/O on what must survive a crash calls [`pass`] around it; an engine is put under a
//! tape by a [`TapeEngine`]. From what a tape has seen a test can tell what a kill or a power cut at
//! any moment may leave behind. Without a tape each costs one look at an `Option`.

use std::{
    collections::HashMap,
    fmt, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{Buffer, Completion, Engine, EngineKind, FileIndex, Op, Quick, new_engine};

/// An I/O. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Io<'a> {
    /// Bytes are read.
    Read {
        /// The file.
        path: &'a Path,
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Bytes are written.
    Write {
        /// The file.
        path: &'a Path,
        /// First byte.
        offset: u64,
        /// What.
        bytes: &'a [u8],
        /// On stable storage when it has ended.
        durable: bool,
    },
    /// A range is made to read as zeros, its room given up or not.
    Zero {
        /// The file.
        path: &'a Path,
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// What had ended before this began is on stable storage when it has ended.
    Sync {
        /// The file.
        path: &'a Path,
    },
    /// A file is made, or one that is there emptied; it has `len` zeros.
    Create {
        /// The file.
        path: &'a Path,
        /// Its length.
        len: u64,
    },
    /// A file gets room and length, zeros where there was nothing.
    Reserve {
        /// The file.
        path: &'a Path,
        /// Its length.
        len: u64,
    },
    /// A directory is made.
    CreateDir {
        /// The directory.
        path: &'a Path,
    },
    /// A file gets another name in its directory, in the place of what has that name.
    Rename {
        /// Its name before.
        from: &'a Path,
        /// Its name afterwards.
        to: &'a Path,
    },
    /// A file loses its name.
    Remove {
        /// The file.
        path: &'a Path,
    },
    /// An extended attribute of a file gets a value.
    SetAttribute {
        /// The file.
        path: &'a Path,
    },
    /// The names in a directory that had changed before this began are on stable storage when it has ended.
    SyncDir {
        /// The directory.
        path: &'a Path,
    },
}

/// Is told of I/O.
pub trait Tape: fmt::Debug + Send + Sync {
    /// An I/O is about to be made. Returns a number for it.
    ///
    /// # Errors
    /// The I/O is not made, and fails with this.
    fn begin(&self, io: Io<'_>) -> io::Result<u64>;

    /// The I/O `number` is over; `done`: as it was asked for.
    ///
    /// # Errors
    /// The I/O fails with this, though it was made.
    fn end(&self, number: u64, done: bool) -> io::Result<()> {
        let _ = (number, done);
        Ok(())
    }
}

/// Makes an I/O, past the tape if there is one.
///
/// # Errors
/// What `make` or the tape says.
pub fn pass<T>(tape: Option<&dyn Tape>, io: Io<'_>, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(tape) = tape else { return make() };
    let number = tape.begin(io)?;
    let outcome = make();
    tape.end(number, outcome.is_ok())?;
    outcome
}

/// What becomes of an operation that the inner engine was given.
#[derive(Debug)]
enum Fate {
    /// It is the tape's I/O of this number.
    Taped(u64),
    /// Nothing was performed in its place: it fails.
    Refused(io::Error, Option<Buffer>),
}

/// An engine whose operations pass a tape: they begin when they are submitted, and end when they are reaped.
#[derive(Debug)]
pub struct TapeEngine {
    inner: Box<dyn Engine>,
    tape: Arc<dyn Tape>,
    paths: Vec<PathBuf>,
    pushed: Vec<(u64, Op)>,
    /// By the inner engine's token: our token, and what comes of it.
    inside: HashMap<u64, (u64, Fate)>,
    next_token: u64,
}

impl TapeEngine {
    /// Puts `inner`, an engine for the files at `paths`, under `tape`.
    pub fn new(inner: Box<dyn Engine>, tape: Arc<dyn Tape>, paths: Vec<PathBuf>) -> TapeEngine {
        TapeEngine { inner, tape, paths, pushed: Vec::new(), inside: HashMap::new(), next_token: 0 }
    }

    fn begin(&self, op: &Op) -> io::Result<u64> {
        let path = self.paths.get(usize::from(op.file().0)).map(PathBuf::as_path).unwrap_or(Path::new(""));
        let (offset, len) = (op.offset(), op.len());
        match op {
            Op::Read { .. } => self.tape.begin(Io::Read { path, offset, len }),
            Op::SyncData { .. } => self.tape.begin(Io::Sync { path }),
            // A tape is told of bytes, and here are none. Whoever shares blocks can copy them as well.
            Op::Share { .. } => Err(rustix::io::Errno::OPNOTSUPP.into()),
            Op::Punch { .. } | Op::Zero { .. } => self.tape.begin(Io::Zero { path, offset, len }),
            Op::Write { buf: Buffer::Owned(buf), .. } => {
                self.tape.begin(Io::Write { path, offset, bytes: buf, durable: false })
            }
            Op::Write { buf: Buffer::Guest(buf), .. } => {
                let mut bytes = vec![0; buf.len()];
                buf.copy_out(0, &mut bytes);
                self.tape.begin(Io::Write { path, offset, bytes: &bytes, durable: false })
            }
        }
    }
}

impl Engine for TapeEngine {
    /// Begins and ends on the tape even if the inner engine leaves it for later: as something that may have been
    /// done in part, which is what was promised.
    fn perform_now(&mut self, quick: Quick<'_>) -> bool {
        let (file, offset, buf) = match quick {
            Quick::Read { file, offset, buf } | Quick::Write { file, offset, buf } => (file, offset, buf),
        };
        let path = self.paths.get(usize::from(file.0)).map(PathBuf::as_path).unwrap_or(Path::new(""));
        let number = match quick {
            Quick::Read { .. } => self.tape.begin(Io::Read { path, offset, len: buf.len() as u64 }),
            Quick::Write { .. } => {
                let mut bytes = vec![0; buf.len()];
                buf.to_buf().copy_out(0, &mut bytes);
                self.tape.begin(Io::Write { path, offset, bytes: &bytes, durable: false })
            }
        };
        let Ok(number) = number else { return false };
        let done = self.inner.perform_now(quick);
        self.tape.end(number, done).is_ok() && done
    }

    fn push(&mut self, token: u64, op: Op) {
        self.pushed.push((token, op));
    }

    fn submit(&mut self) {
        for (token, op) in std::mem::take(&mut self.pushed) {
            let (op, fate) = match self.begin(&op) {
                Ok(number) => (op, Fate::Taped(number)),
                // An operation on no bytes goes in its place, so that its completion comes the usual way.
                Err(error) => {
                    let nothing = Op::Punch { file: FileIndex(0), offset: 0, len: 0 };
                    (nothing, Fate::Refused(error, op.into_buf()))
                }
            };
            self.inside.insert(self.next_token, (token, fate));
            self.inner.push(self.next_token, op);
            self.next_token += 1;
        }
        self.inner.submit();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut completions = Vec::new();
        self.inner.reap(&mut completions);
        for Completion { token, mut result, buf } in completions {
            match self.inside.remove(&token) {
                Some((token, Fate::Taped(number))) => {
                    if let Err(error) = self.tape.end(number, result.is_ok()) {
                        result = Err(error);
                    }
                    done.push(Completion { token, result, buf });
                }
                Some((token, Fate::Refused(error, buf))) => {
                    done.push(Completion { token, result: Err(error), buf });
                }
                None => {}
            }
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.pushed.len() + self.inner.in_flight()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.completion_fd()
    }
}

impl Drop for TapeEngine {
    fn drop(&mut self) {
        // What was begun has landed when the inner engine is gone.
        if let Ok(idle) = new_engine(EngineKind::Sync, 1, Vec::new()) {
            drop(std::mem::replace(&mut self.inner, idle));
        }
        for (_, fate) in self.inside.values() {
            if let Fate::Taped(number) = fate {
                let _ = self.tape.end(*number, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{AlignedBuf, File, OpenOptions};

    #[derive(Debug, Default)]
    struct Listed(Mutex<Vec<String>>);

    impl Tape for Listed {
        fn begin(&self, io: Io<'_>) -> io::Result<u64> {
            let mut list = self.0.lock().unwrap();
            let (what, offset) = match io {
                Io::Write { offset, bytes, .. } => (format!("write {}", bytes[0]), offset),
                Io::Read { offset, .. } => ("read".to_owned(), offset),
                other => (format!("{other:?}"), 0),
            };
            list.push(format!("{what} at {offset}"));
            if offset == 8192 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(list.len() as u64) }
        }

        fn end(&self, number: u64, done: bool) -> io::Result<()> {
            self.0.lock().unwrap().push(format!("{number} {done}"));
            if number == 2 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn operations_of_a_taped_engine_are_told_of_and_fail_where_the_tape_says() {
        for kind in [EngineKind::Sync, EngineKind::IoUring] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            let options = OpenOptions { write: true, ..OpenOptions::default() };
            let file = Arc::new(File::create_new(&path, 1 << 20, options).unwrap());
            let tape = Arc::new(Listed::default());
            let inner = new_engine(kind, 4, vec![file]).unwrap();
            let mut engine = TapeEngine::new(inner, tape.clone(), vec![path.clone()]);
            for block in 0..3 {
                let mut buf = AlignedBuf::new_zeroed(4096);
                buf.fill(block as u8 + 1);
                let op = Op::Write { file: FileIndex(0), offset: block * 4096, buf: Buffer::Owned(buf) };
                engine.push(block, op);
            }
            assert!(tape.0.lock().unwrap().is_empty(), "nothing begins before it is submitted");
            engine.submit();
            let mut done = Vec::new();
            while engine.in_flight() > 0 {
                engine.wait(None).unwrap();
                engine.reap(&mut done);
            }
            done.sort_by_key(|completion| completion.token);
            let kinds: Vec<_> = done.iter().map(|c| c.result.as_ref().err().map(io::Error::kind)).collect();
            assert_eq!(kinds, [None, Some(io::ErrorKind::TimedOut), Some(io::ErrorKind::StorageFull)]);
            assert!(done.iter().all(|completion| completion.buf.is_some()));
            let content = std::fs::read(&path).unwrap();
            assert_eq!([content[0], content[4096], content[8192]], [1, 2, 0]);
            let mut list = tape.0.lock().unwrap().clone();
            assert_eq!(list[..3], ["write 1 at 0", "write 2 at 4096", "write 3 at 8192"]);
            list[3..].sort();
            assert_eq!(list[3..], ["1 true", "2 true"]);
        }
    }
}

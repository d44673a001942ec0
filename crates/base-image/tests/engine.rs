//! An engine with a base that is not raw keeps what engines promise.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use base_image::{BaseImage, Urgency};
use blockio::{
    AlignedBuf, Buffer, Completion, Engine, EngineKind, File, FileIndex, GuestBuf, Op, OpenOptions,
    new_engine,
};
use rustix::event::{PollFd, PollFlags, poll};

use common::{Lab, mixed};

const DISK: FileIndex = FileIndex(0);
const BASE: FileIndex = FileIndex(1);
const SIZE: u64 = 4 << 20;

struct Setup {
    lab: Lab,
    base: BaseImage,
    expected: Vec<u8>,
}

impl Setup {
    fn new() -> Self {
        let lab = Lab::new();
        mixed(&lab.path("one.raw"), SIZE, 4);
        lab.img("convert -f raw -O qcow2 -c one.raw packed");
        let base = lab.open("packed").unwrap();
        let expected = fs::read(lab.path("one.raw")).unwrap();
        File::create_new(&lab.path("disk"), SIZE, OpenOptions::default()).unwrap();
        Self { lab, base, expected }
    }

    fn engine(&self, kind: EngineKind) -> Box<dyn Engine> {
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let disk = Arc::new(File::open(&self.lab.path("disk"), options).unwrap());
        let inner = new_engine(kind, 8, vec![disk, Arc::clone(self.base.file().unwrap())]).unwrap();
        self.base.engine(inner, BASE, Urgency::Guest).unwrap()
    }
}

fn read(file: FileIndex, offset: u64, len: usize) -> Op {
    Op::Read { file, offset, buf: Buffer::Owned(AlignedBuf::new_zeroed(len)) }
}

/// Waits for `count` completions, by the descriptor or by `wait`.
fn collect(engine: &mut dyn Engine, count: usize, by_fd: bool) -> Vec<Completion> {
    let mut done = Vec::new();
    engine.reap(&mut done);
    while done.len() < count {
        if by_fd {
            let fd = engine.completion_fd().unwrap();
            poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).unwrap();
        } else {
            engine.wait(None).unwrap();
        }
        engine.reap(&mut done);
    }
    assert_eq!((done.len(), engine.in_flight()), (count, 0));
    done.sort_by_key(|completion| completion.token);
    done
}

#[test]
fn operations_on_disk_and_base_complete_once_each_with_what_they_read() {
    let setup = Setup::new();
    for (kind, by_fd) in [
        (EngineKind::Sync, true),
        (EngineKind::Sync, false),
        (EngineKind::IoUring, true),
        (EngineKind::IoUring, false),
    ] {
        let mut engine = setup.engine(kind);
        let mut data = AlignedBuf::new_zeroed(4096);
        data.fill(9);
        engine.push(1000, Op::Write { file: DISK, offset: 8192, buf: Buffer::Owned(data) });
        engine.submit();
        collect(&mut *engine, 1, by_fd)[0].result.as_ref().unwrap();
        let guest = GuestBuf::zeroed(300_000);
        engine.push(1001, Op::Read { file: BASE, offset: 1 << 20, buf: Buffer::Guest(guest.clone()) });
        for n in 0..200_u64 {
            let file = if n % 3 == 0 { DISK } else { BASE };
            engine.push(n, read(file, n * 20_000 / 512 * 512, 4096));
        }
        assert_eq!(engine.in_flight(), 201);
        let mut none = Vec::new();
        engine.reap(&mut none);
        // Nothing begins before it is submitted, and nobody waits for what was not.
        engine.wait(None).unwrap();
        assert!(none.is_empty());
        engine.submit();
        let done = collect(&mut *engine, 201, by_fd);
        for (n, completion) in done[..200].iter().enumerate() {
            completion.result.as_ref().unwrap();
            let Some(Buffer::Owned(buf)) = &completion.buf else { panic!("no buffer") };
            let offset = n * 20_000 / 512 * 512;
            if n % 3 != 0 {
                assert!(buf[..] == setup.expected[offset..offset + 4096], "at {offset}");
            }
        }
        let mut bytes = vec![0; 300_000];
        guest.copy_out(0, &mut bytes);
        assert!(bytes == setup.expected[1 << 20..(1 << 20) + 300_000]);
    }
}

/// Invariant 5: whatever is asked, a base is not written to.
#[test]
fn write_to_a_base_fails_and_gives_its_buffer_back() {
    let setup = Setup::new();
    let hash = fs::read(setup.lab.path("packed")).unwrap();
    let mut engine = setup.engine(EngineKind::IoUring);
    let buf = Buffer::Owned(AlignedBuf::new_zeroed(4096));
    engine.push(1, Op::Write { file: BASE, offset: 0, buf });
    engine.push(2, Op::Punch { file: BASE, offset: 0, len: 4096 });
    engine.submit();
    let done = collect(&mut *engine, 2, true);
    assert!(done.iter().all(|completion| completion.result.is_err()) && done[0].buf.is_some());
    assert_eq!(fs::read(setup.lab.path("packed")).unwrap(), hash);
}

/// A read past the end fails, as it does on a file.
#[test]
fn read_past_the_end_of_a_base_fails() {
    let setup = Setup::new();
    let mut engine = setup.engine(EngineKind::Sync);
    engine.push(1, read(BASE, SIZE - 4096, 8192));
    engine.submit();
    assert!(collect(&mut *engine, 1, false)[0].result.is_err());
}

#[test]
fn wait_ends_at_its_limit_and_dropping_waits_for_what_was_begun() {
    let setup = Setup::new();
    let mut engine = setup.engine(EngineKind::IoUring);
    engine.wait(Some(Duration::from_millis(1))).unwrap();
    let guest = GuestBuf::zeroed(SIZE as usize);
    for n in 0..50 {
        engine.push(n, Op::Read { file: BASE, offset: 0, buf: Buffer::Guest(guest.clone()) });
    }
    engine.submit();
    drop(engine);
    // Nothing lands any more.
    guest.fill_zero(0, SIZE as usize);
    let mut bytes = vec![1; SIZE as usize];
    guest.copy_out(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0));
}

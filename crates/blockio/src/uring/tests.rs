//! What only a look inside the engine, or I/O that waits for us, can show.

use std::{io::Write, sync::atomic::AtomicBool, sync::atomic::Ordering};

use rustix::event::{PollFd, PollFlags};

use super::*;
use crate::{AlignedBuf, Buffer, FileIndex, GuestBuf, IoVec, OpenOptions, Zeroing};

fn pipe() -> (Arc<File>, std::fs::File) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    (Arc::new(File::disguised(read)), write.into())
}

fn read(len: usize) -> Op {
    Op::Read { file: FileIndex(0), offset: 0, buf: AlignedBuf::new_zeroed(len).into() }
}

fn reap_one(engine: &mut UringEngine) -> Completion {
    let mut done = Vec::new();
    while done.is_empty() {
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    assert_eq!(done.len(), 1);
    done.remove(0)
}

fn regular(len: usize) -> (tempfile::NamedTempFile, Arc<File>) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![7; len]).unwrap();
    let opened = File::open(file.path(), OpenOptions { write: true, ..Default::default() }).unwrap();
    (file, Arc::new(opened))
}

/// Memory of I/O in flight is not freed before the kernel is done with it (invariant 2: no I/O
/// of an old session lands late).
#[test]
fn engine_dropped_with_io_in_flight_waits_until_it_landed() {
    let (file, mut feed) = pipe();
    let mut memory = AlignedBuf::new_zeroed(4096);
    let part = IoVec { base: memory.as_mut_ptr(), len: memory.len() };
    let guard = Arc::new(memory);
    // SAFETY: the guard owns the memory.
    let buf = unsafe { GuestBuf::new([part], guard.clone()) };
    let mut engine = UringEngine::new(4, vec![file]).unwrap();
    engine.push(1, Op::Read { file: FileIndex(0), offset: 0, buf: buf.into() });
    engine.submit();
    assert_eq!(Arc::strong_count(&guard), 2);
    let fed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            fed.store(true, Ordering::Release);
            feed.write_all(&[9; 4096]).unwrap();
        });
        drop(engine);
        assert!(fed.load(Ordering::Acquire), "dropped while the kernel still used the memory");
    });
    assert_eq!(Arc::strong_count(&guard), 1);
    assert!(guard.iter().all(|byte| *byte == 9));
}

#[test]
fn short_read_is_continued_until_every_byte_is_there() {
    let (file, mut feed) = pipe();
    let mut engine = UringEngine::new(4, vec![file]).unwrap();
    engine.push(5, read(100));
    engine.submit();
    let mut done = Vec::new();
    for byte in 0..99 {
        feed.write_all(&[byte]).unwrap();
        engine.wait(Some(Duration::from_millis(1))).unwrap();
        engine.reap(&mut done);
        assert!(done.is_empty());
    }
    feed.write_all(&[99]).unwrap();
    let done = reap_one(&mut engine);
    done.result.unwrap();
    let Some(Buffer::Owned(buf)) = done.buf else { panic!("no buffer") };
    assert!(buf.iter().copied().eq(0..100));
}

#[test]
fn read_that_meets_the_end_after_some_bytes_is_an_unexpected_end() {
    let (file, mut feed) = pipe();
    let mut engine = UringEngine::new(4, vec![file]).unwrap();
    engine.push(5, read(100));
    engine.submit();
    feed.write_all(&[1; 60]).unwrap();
    drop(feed);
    assert_eq!(reap_one(&mut engine).result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(engine.in_flight(), 0);
}

#[test]
fn io_of_a_thread_that_ended_is_finished_by_another_one() {
    let (file, mut feed) = pipe();
    let mut engine = UringEngine::new(4, vec![file]).unwrap();
    let mut engine = std::thread::spawn(move || {
        engine.push(5, read(100));
        engine.submit();
        engine
    })
    .join()
    .unwrap();
    feed.write_all(&[1; 100]).unwrap();
    reap_one(&mut engine).result.unwrap();
}

/// A buffered read goes on in its thread when the page is there. If that has ended, the kernel says so with another word.
#[test]
fn read_that_waits_for_a_page_when_its_thread_ends_is_finished_by_another_one() {
    const LEN: usize = 128 << 10;
    const READS: u64 = 256;
    let (guard, file) = regular(READS as usize * LEN);
    guard.as_file().sync_all().unwrap();
    rustix::fs::fadvise(guard.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut engine = UringEngine::new(READS as u32, vec![file]).unwrap();
    let mut engine = std::thread::spawn(move || {
        // The last one first, so that the kernel reads nothing ahead.
        for index in (0..READS).rev() {
            let buf = AlignedBuf::new_zeroed(LEN).into();
            engine.push(index, Op::Read { file: FileIndex(0), offset: index * LEN as u64, buf });
        }
        engine.submit();
        engine
    })
    .join()
    .unwrap();
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    assert_eq!(done.len() as u64, READS);
    for completion in done {
        completion.result.unwrap();
        let Some(Buffer::Owned(buf)) = completion.buf else { panic!("the buffer is gone") };
        assert!(buf.iter().all(|byte| *byte == 7));
    }
}

#[test]
fn more_operations_than_the_ring_holds_are_all_performed() {
    let (_guard, file) = regular(1 << 16);
    let mut engine = UringEngine::new(2, vec![file]).unwrap();
    for token in 0..1000 {
        engine.push(token, read(512));
    }
    engine.submit();
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        assert!(engine.at_work <= engine.at_work_max);
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    let mut tokens: Vec<u64> = done.iter().map(|done| done.token).collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..1000));
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert_eq!(engine.works.len(), 1000);
}

/// A record in the log comes before the data (invariant 1): the caller appends between push
/// and submit.
#[test]
fn pushed_operation_is_not_started_by_anything_but_submit() {
    let (_guard, file) = regular(4096);
    let mut engine = UringEngine::new(4, vec![file.clone()]).unwrap();
    let mut done = Vec::new();
    engine.push(1, read(512));
    engine.submit();
    engine.push(2, Op::Write { file: FileIndex(0), offset: 0, buf: AlignedBuf::new_zeroed(512).into() });
    engine.wait(None).unwrap();
    engine.reap(&mut done);
    engine.wait(None).unwrap();
    engine.reap(&mut done);
    assert_eq!(done.iter().map(|done| done.token).collect::<Vec<_>>(), [1]);
    assert_eq!(engine.in_flight(), 1);
    drop(engine);
    let mut now = [0; 512];
    file.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(now, [7; 512]);
}

/// Puts a pipe where the ring's descriptor was: the kernel takes nothing any more, but the
/// ring lives on in its mapping and what is in flight completes.
fn break_ring(engine: &UringEngine) -> std::os::fd::OwnedFd {
    let (read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: replaces the file behind the ring's own descriptor, which stays open.
    assert!(unsafe { libc::dup2(read.as_raw_fd(), engine.ring.as_raw_fd()) } >= 0);
    write
}

#[test]
fn broken_ring_fails_new_operations_and_still_waits_for_the_old_ones() {
    let (file, mut feed) = pipe();
    let mut engine = UringEngine::new(4, vec![file]).unwrap();
    engine.push(1, read(8));
    engine.submit();
    let wakes_poll = break_ring(&engine);
    for token in 2..10 {
        engine.push(token, read(8));
    }
    engine.submit();
    let mut done = Vec::new();
    engine.reap(&mut done);
    assert_eq!(done.iter().map(|done| done.token).collect::<Vec<_>>(), Vec::from_iter(2..10));
    assert!(done.iter().all(|done| done.result.is_err() && done.buf.is_some()));
    assert_eq!(engine.in_flight(), 1);
    let fed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            fed.store(true, Ordering::Release);
            feed.write_all(&[9; 8]).unwrap();
            drop(wakes_poll);
        });
        drop(engine);
        assert!(fed.load(Ordering::Acquire));
    });
}

#[test]
fn operation_that_makes_no_sense_completes_as_invalid_input() {
    let (_guard, file) = regular(4096);
    let mut engine = UringEngine::new(4, vec![file]).unwrap();
    let write =
        |file, offset| Op::Write { file: FileIndex(file), offset, buf: AlignedBuf::new_zeroed(512).into() };
    for op in [write(1, 0), write(255, 0), write(0, u64::MAX), write(0, i64::MAX as u64 - 511)] {
        engine.push(1, op);
        engine.submit();
        let fd = engine.completion_fd().unwrap();
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
        let done = reap_one(&mut engine);
        assert_eq!(done.result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(done.buf.is_some());
    }
}

/// An engine at work on 50 reads, which are handed out four at a time.
fn with_batches_of_4(file: Arc<File>) -> UringEngine {
    let mut engine = UringEngine::new(64, vec![file]).unwrap();
    engine.batch = 4;
    (0..50).for_each(|token| engine.push(token, read(512)));
    engine.submit();
    engine
}

/// Direct I/O is handed out in small parts: whoever waits for the descriptor gets all of it.
#[test]
fn completions_beyond_a_batch_are_told_of_until_all_are_reaped() {
    let (_guard, file) = regular(1 << 16);
    let mut engine = with_batches_of_4(file);
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        let fd = engine.completion_fd().unwrap();
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
        let before = done.len();
        engine.reap(&mut done);
        assert!(done.len() - before <= 4);
    }
    let mut tokens: Vec<u64> = done.iter().map(|done| done.token).collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..50));
}

#[test]
fn engine_dropped_with_more_than_a_batch_complete_ends() {
    let (_guard, file) = regular(1 << 16);
    let engine = with_batches_of_4(file);
    let (gone, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(engine);
        gone.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(30)).expect("dropping the engine hangs");
}

/// A long write that would make a large folio is cut, elsewhere; one into what is there can't make any.
#[test]
fn long_write_is_made_at_once_only_where_it_makes_no_folio() {
    let (_temp, mut file) = regular(256 << 10);
    Arc::get_mut(&mut file).unwrap().write_max = 16 << 10;
    let mut memory = AlignedBuf::new_zeroed(64 << 10);
    let part = IoVec { base: memory.as_mut_ptr(), len: memory.len() };
    // SAFETY: the guard owns the memory.
    let buf = unsafe { GuestBuf::new([part], Arc::new(memory)) };
    let mut engine = crate::sync::SyncEngine::new(vec![Arc::clone(&file)]);
    let mut write = |buf: &GuestBuf| {
        engine.perform_now(Quick::Write { file: FileIndex(0), offset: 4096, buf: buf.view() })
    };
    assert!(!write(&buf));
    assert!(write(&buf.slice(0, 16 << 10).unwrap()));
    file.map_resident(None);
    if file.resident().is_some() {
        assert!(write(&buf));
    }
}

/// Zeroes that have to be written (tmpfs can only punch) are counted as what is copied by way of memory that is made for it.
#[test]
fn memory_of_zeroes_that_are_written_is_bounded_and_given_back() {
    const LEN: u64 = 3 << 20;
    let Ok(mut temp) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
    temp.write_all(&vec![7; LEN as usize]).unwrap();
    let opened = File::open(temp.path(), OpenOptions { write: true, ..Default::default() }).unwrap();
    let mut engine = UringEngine::new(64, vec![Arc::new(opened)]).unwrap();
    for token in 0..32 {
        engine.push(token, Op::Zero { file: FileIndex(0), offset: 0, len: LEN - token, how: Zeroing::Keep });
    }
    engine.submit();
    let mut done = Vec::new();
    while done.len() < 32 {
        assert!(engine.bounced <= BOUNCED_MAX);
        let before = done.len();
        engine.wait(None).unwrap();
        engine.reap(&mut done);
        assert!(done.len() > before, "nothing is begun any more");
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert_eq!(engine.bounced, 0);
    assert!(std::fs::read(temp.path()).unwrap().iter().all(|byte| *byte == 0));
}

/// Invariant 8: many long requests into memory that direct I/O can't take hold no more memory than a few of them.
#[test]
fn memory_of_requests_that_are_not_aligned_is_bounded() {
    const LEN: usize = 3 << 20;
    // Not in memory: direct I/O takes any there.
    let mut file = tempfile::NamedTempFile::new_in(".").unwrap();
    file.write_all(&(0..LEN).map(|at| (at / 512) as u8).collect::<Vec<_>>()).unwrap();
    let direct = OpenOptions { write: true, direct: true, ..Default::default() };
    let file = Arc::new(File::open(file.path(), direct).unwrap());
    let mut engine = UringEngine::new(64, vec![file]).unwrap();
    let memory: Vec<_> = (0..32).map(|_| Arc::new(AlignedBuf::new_zeroed(LEN + 512))).collect();
    for (token, memory) in (0..).zip(&memory) {
        let part = IoVec { base: memory.as_ptr().wrapping_add(1).cast_mut(), len: LEN };
        // SAFETY: the guard owns the memory.
        let buf = unsafe { GuestBuf::new([part], memory.clone()) };
        engine.push(token, Op::Read { file: FileIndex(0), offset: 0, buf: buf.into() });
    }
    engine.submit();
    let (mut done, mut most) = (Vec::new(), 0);
    while done.len() < memory.len() {
        most = most.max(engine.bounced);
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert_eq!(engine.bounced, 0);
    assert!((1 << 20..=BOUNCED_MAX).contains(&most), "{most} bytes");
    for memory in memory {
        assert!((0..LEN).step_by(512).all(|at| memory[at + 1] == (at / 512) as u8));
    }
}

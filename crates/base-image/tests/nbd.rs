//! Bases of NBD servers: what a server says is believed only as far as it answers what was asked, and a server that is away is waited
//! for. (`tests/tests/nbd.rs` is about real servers.)
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[path = "common/nbd.rs"]
mod fake;
#[path = "common/relay.rs"]
mod relay;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use base_image::{BaseError, BaseFormat, BaseImage, Content, Seal, Urgency, seal_to};
use blockio::{AlignedBuf, Buffer, EngineKind, FileIndex, Op, new_engine};

use fake::{Answer, Manners, Server};
use relay::Relay;

const SIZE: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Of reads that are to fail.
const IMPATIENCE: Duration = Duration::from_secs(2);

/// A third holes, the rest data.
fn content() -> Vec<u8> {
    let word = |n: usize| if (n / 32768).is_multiple_of(3) { 0 } else { (n / 512 % 241 + n % 7 + 1) as u8 };
    (0..SIZE).map(word).collect()
}

fn open(server: &Server, patience: Duration) -> BaseImage {
    BaseImage::connect(&server.uri(), None, None, patience).unwrap()
}

fn assert_reads(base: &BaseImage, expected: &[u8], offset: usize, len: usize) {
    let mut buf = vec![0xee; len];
    base.read_at(&mut buf, offset as u64).unwrap();
    assert!(buf == expected[offset..offset + len], "at {offset}, {len} bytes");
}

/// The same of a server that has just come back: reads go on failing until the next attempt to connect.
fn assert_reads_again(base: &BaseImage, expected: &[u8]) {
    let mut buf = [0; 8192];
    while base.read_at(&mut buf, 0).is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(buf == expected[..8192]);
    assert_eq!(base.trouble(), None);
}

fn error_of(base: &BaseImage, offset: u64) -> String {
    let mut buf = [0; 8192];
    let error = base.read_at(&mut buf, offset).unwrap_err();
    text(&error)
}

fn text(error: &BaseError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// Invariant 4: bytes and holes are the server's, whatever of the protocol it speaks.
#[test]
fn export_is_read_exactly_with_whatever_the_server_can_do() {
    let expected = content();
    for (structured, tells_holes, told_max, block_sizes) in [
        (false, false, 0, (0, 0)),
        (true, false, 0, (1, 1 << 25)),
        (true, true, usize::MAX, (512, 512)),
        (true, true, usize::MAX, (65536, 131_072)),
        (true, true, 5, (512, 1 << 25)),
    ] {
        let manners =
            Manners { structured, tells_holes, told_max, block_sizes, ..Manners::new(expected.clone()) };
        let server = Server::start(manners);
        let base = open(&server, PATIENCE);
        assert_eq!((base.size(), base.format()), (SIZE as u64, BaseFormat::Raw));
        for (offset, len) in [(0, SIZE), (0, 512), (512, 4096), (1023, 77_777), (SIZE - 513, 513)] {
            assert_reads(&base, &expected, offset, len);
        }
        let (mut at, mut holes) = (0, 0);
        while at < SIZE {
            at += match base.content_at(at as u64, (SIZE - at) as u64).unwrap() {
                Content::Data(len) => len as usize,
                Content::Hole(len) => {
                    assert!(expected[at..at + len as usize].iter().all(|byte| *byte == 0));
                    holes += len as usize;
                    len as usize
                }
            };
        }
        assert_eq!(holes, if tells_holes { expected.iter().filter(|byte| **byte == 0).count() } else { 0 });
        // Invariant 5: nothing but reads, status and good-bye was ever asked for.
        drop(base);
        assert!(server.requests().iter().all(|(kind, ..)| [0, 2, 7].contains(kind)));
        let asked = server.requests().iter().filter(|(kind, ..)| *kind == 7).count();
        assert!(asked <= 1 || told_max == 5, "one question is enough for the holes of 1 MiB, not {asked}");
    }
}

/// Invariant 2: what does not answer the question, wholly and once, is never taken for content; the next answer is.
#[test]
fn answers_that_are_wrong_are_errors_and_never_content() {
    let expected = content();
    let server = Server::start(Manners::new(expected.clone()));
    let base = open(&server, PATIENCE);
    let at = 32_768;
    for (answer, word) in [
        (Answer::Short, "less than what was asked"),
        (Answer::Twice, "twice"),
        (Answer::Beyond, "more than what was asked"),
        (Answer::OtherCookie, "not asked"),
        (Answer::OtherKind, "part that was not asked for"),
        (Answer::Empty, "less than what was asked"),
        (Answer::Garbage, "not the NBD protocol"),
        (Answer::Error, "bad"),
        (Answer::SimpleError, "failed"),
    ] {
        server.set(|manners| manners.once = Some(answer));
        let error = error_of(&base, at);
        assert!(error.contains(word), "{answer:?}: {error}");
        assert_reads(&base, &expected, at as usize, 8192);
    }
    // An error of the server's is no reason to connect anew.
    let before = server.connections();
    server.set(|manners| manners.once = Some(Answer::Error));
    error_of(&base, at);
    assert_reads(&base, &expected, at as usize, 8192);
    assert_eq!(server.connections(), before);
}

/// Invariant 2: whichever bit of all that is not content is wrong, what is read is right or an error, and what comes
/// afterwards is not mistaken for something else.
#[test]
fn any_bit_that_is_wrong_makes_an_error_or_no_difference() {
    let expected = content();
    let server = Server::start(Manners { block_sizes: (512, 1 << 25), ..Manners::new(expected.clone()) });
    let (mut right, mut wrong) = (0, 0);
    for bit in (0..2400).step_by(7) {
        server.set(|manners| manners.flipped = Some(bit));
        let size = Some(SIZE as u64);
        let Ok(base) = BaseImage::connect(&server.uri(), None, size, Duration::from_millis(30)) else {
            continue;
        };
        for offset in [30_000, 60_000, 90_000] {
            let mut buf = [0xee; 8192];
            match base.read_at(&mut buf, offset as u64) {
                Ok(()) => {
                    assert!(buf == expected[offset..offset + 8192], "bit {bit}");
                    right += 1;
                }
                Err(_) => wrong += 1,
            }
        }
    }
    assert!(right > 0 && wrong > 0, "{right} right, {wrong} wrong");
}

/// A connection that breaks in the middle of an answer is replaced, unseen.
#[test]
fn read_whose_connection_breaks_is_done_again() {
    let expected = content();
    for structured in [false, true] {
        let server = Server::start(Manners { structured, ..Manners::new(expected.clone()) });
        let base = open(&server, PATIENCE);
        for offset in [40_000, 80_000, 40_000] {
            let before = server.connections();
            server.set(|manners| manners.once = Some(Answer::Breaks));
            assert_reads(&base, &expected, offset, 10_000);
            assert_eq!(server.connections(), before + 1);
        }
    }
}

/// A server that is away is waited for; reads that began meanwhile are done when it is back.
#[test]
fn read_of_a_server_that_is_away_is_done_when_it_is_back() {
    let expected = content();
    let server = Server::start(Manners::new(expected.clone()));
    let base = open(&server, PATIENCE);
    server.set(|manners| (manners.is_away, manners.once) = (true, Some(Answer::Breaks)));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..6)
            .map(|n| {
                scope.spawn({
                    let (base, expected) = (&base, &expected);
                    move || assert_reads(base, expected, n * 100_000, 50_000)
                })
            })
            .collect();
        while base.trouble().is_none() || server.connections() < 6 {
            std::thread::yield_now();
        }
        assert!(readers.iter().any(|reader| !reader.is_finished()));
        server.set(|manners| manners.is_away = false);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    assert_eq!(base.trouble(), None);
    // Many read over several connections, and over one where the server wants that.
    let one = Server::start(Manners { multi_conn: false, ..Manners::new(expected.clone()) });
    let base = open(&one, PATIENCE);
    std::thread::scope(|scope| {
        (0..6).for_each(|n| {
            let (base, expected) = (&base, &expected);
            scope.spawn(move || assert_reads(base, expected, n * 100_000, 50_000));
        });
    });
    assert_eq!(one.connections(), 1);
}

/// A way that has fallen silent costs a read a part of its patience, not all of it, and other reads no more: the server is
/// there. It does not matter whether the request got lost or only its answer.
#[test]
fn read_goes_another_way_when_its_own_has_fallen_silent() {
    let expected = content();
    let server = Server::start(Manners::new(expected.clone()));
    let relay = Relay::to(server.socket());
    let uri = format!("nbd://{}/golden", relay.address).parse().unwrap();
    let patience = Duration::from_secs(6);
    let base = BaseImage::connect(&uri, None, None, patience).unwrap();
    assert_reads(&base, &expected, 0, 8192);
    assert_eq!(relay.fall_silent(), 1);
    assert_reads(&base, &expected, 40_000, 8192);
    assert_eq!((base.trouble(), relay.fall_silent()), (None, 2));
    std::thread::scope(|scope| {
        (0..3).for_each(|n| {
            let (base, expected) = (&base, &expected);
            scope.spawn(move || assert_reads(base, expected, n * 100_000, 50_000));
        });
    });
    // The request arrives and is confirmed.
    let asked = server.requests().len();
    server.set(|manners| manners.once = Some(Answer::Stalls));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| assert_reads(&base, &expected, 70_000, 8192));
        while server.requests().len() == asked && !reader.is_finished() {
            std::thread::yield_now();
        }
        relay.fall_silent();
        reader.join().unwrap();
    });
}

/// Reads fail in bounded time: of a server that is away, that says nothing, that says next to nothing.
#[test]
fn read_of_a_server_that_stays_away_fails_and_says_why() {
    let expected = content();
    let server = Server::start(Manners { structured: false, ..Manners::new(expected.clone()) });
    for answer in [Answer::Stalls, Answer::Drips] {
        let base = open(&server, IMPATIENCE);
        server.set(|manners| manners.answer = answer);
        let error = error_of(&base, 0);
        assert!(error.contains("does not answer") && error.contains("/golden"), "{answer:?}: {error}");
        server.set(|manners| manners.answer = Answer::Right);
        assert_reads_again(&base, &expected);
    }
    let base = open(&server, IMPATIENCE);
    server.set(|manners| (manners.is_away, manners.once) = (true, Some(Answer::Breaks)));
    let error = error_of(&base, 0);
    assert!(error.contains("closed the connection"), "{error}");
    assert!(base.trouble().unwrap().contains("closed the connection"));
    server.set(|manners| manners.is_away = false);
    assert_reads_again(&base, &expected);
}

/// Invariant 5: what has another size is not the base, and not read; the right one is, when it is back.
#[test]
fn export_that_comes_back_with_another_size_is_not_read() {
    let expected = content();
    let server = Server::start(Manners::new(expected.clone()));
    let base = open(&server, IMPATIENCE);
    server.set(|manners| {
        manners.content = Arc::new(vec![7; SIZE + 4096]);
        manners.once = Some(Answer::Garbage);
    });
    // The first only loses the connection.
    error_of(&base, 0);
    let error = error_of(&base, 0);
    assert!(error.contains("has 1052672 bytes, expected 1048576"), "{error}");
    server.set(|manners| manners.content = Arc::new(expected.clone()));
    assert_reads_again(&base, &expected);

    let other = BaseImage::connect(&server.uri(), None, Some(4096), IMPATIENCE).unwrap_err();
    assert!(text(&other).contains("expected 4096"), "{other}");
}

/// What is known by its size can be opened while its server is away, and is read when it is there.
#[test]
fn base_of_known_size_is_opened_without_its_server() {
    let expected = content();
    let server = Server::start(Manners { is_away: true, ..Manners::new(expected.clone()) });
    let error = BaseImage::connect(&server.uri(), None, None, PATIENCE).unwrap_err();
    assert!(text(&error).contains("closed the connection"), "{error}");
    let base = BaseImage::connect(&server.uri(), None, Some(SIZE as u64), PATIENCE).unwrap();
    assert!(base.trouble().is_some());
    server.set(|manners| manners.is_away = false);
    assert_reads(&base, &expected, 0, SIZE);
    assert_eq!(base.trouble(), None);
}

/// Who wants to stop does not wait for a server, whether it is away or silent.
#[test]
fn hurry_ends_reads_that_wait() {
    let hours = Duration::from_secs(7200);
    for is_away in [false, true] {
        let server = Server::start(Manners::new(content()));
        let base = open(&server, hours);
        server.set(|manners| {
            manners.answer = Answer::Stalls;
            (manners.is_away, manners.once) = (is_away, is_away.then_some(Answer::Breaks));
        });
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| error_of(&base, 0));
            while server.requests().is_empty() {
                std::thread::yield_now();
            }
            base.set_hurry(true);
            reader.join().unwrap();
        });
        base.set_hurry(false);
        server.set(|manners| (manners.answer, manners.is_away) = (Answer::Right, false));
        assert_reads_again(&base, &content());
    }
}

#[test]
fn export_that_is_missing_or_not_raw_is_refused_with_a_reason() {
    let server = Server::start(Manners::new(content()));
    let uri = server.uri().as_str().replace("golden", "silver").parse().unwrap();
    let error = text(&BaseImage::connect(&uri, None, None, PATIENCE).unwrap_err());
    assert!(error.contains("does not have the export \"silver\": \"no such thing\""), "{error}");
    let error = BaseImage::connect(&server.uri(), Some(BaseFormat::Qcow2), None, PATIENCE).unwrap_err();
    assert!(error.to_string().contains("qemu-nbd --format qcow2"), "{error}");
}

/// The engine of such a base reads it, and never its place among the files.
#[test]
fn engine_of_an_export_reads_it_without_a_file() {
    let expected = content();
    let server = Server::start(Manners::new(expected.clone()));
    let base = open(&server, PATIENCE);
    assert!(base.file().is_none() && base.paths().unwrap().is_empty());
    let inner = new_engine(EngineKind::Sync, 8, Vec::new()).unwrap();
    let mut engine = base.engine(inner, FileIndex(1), Urgency::Guest).unwrap();
    for n in 0..8 {
        let buf = Buffer::Owned(AlignedBuf::new_zeroed(100_000));
        engine.push(n, Op::Read { file: FileIndex(1), offset: n * 100_000, buf });
    }
    engine.submit();
    let mut done = Vec::new();
    while done.len() < 8 {
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    for completion in done {
        completion.result.unwrap();
        let Some(Buffer::Owned(buf)) = completion.buf else { panic!("no buffer") };
        assert!(buf[..] == expected[completion.token as usize * 100_000..][..100_000]);
    }
}

/// Invariant 2: with a seal, an export that is another one of the same size is noticed at the first byte.
#[test]
fn sealed_export_that_was_replaced_is_noticed() {
    let expected = content();
    let server = Server::start(Manners::new(expected.clone()));
    let dir = tempfile::tempdir().unwrap();
    let manifest = dir.path().join("golden.manifest");
    let root = seal_to(&open(&server, PATIENCE), &manifest, &AtomicBool::new(false), &mut |_| ()).unwrap();
    let seal = || Seal::at(&manifest).unwrap().unwrap();
    assert_eq!(seal().root(), root);
    let base = open(&server, PATIENCE).sealed(seal()).unwrap();
    assert_reads(&base, &expected, 1000, 300_000);
    let mut other = expected.clone();
    other[500_000] ^= 1;
    server.set(|manners| manners.content = Arc::new(other));
    let error = error_of(&base, 500_000 - 4096);
    assert!(error.contains("not what was sealed"), "{error}");
    assert_reads(&base, &expected, 0, 65_536);
}

/// Invariants 2 and 4: what a server calls a hole of a sealed base is one only if zeroes were sealed there, also if it reads the
/// right bytes all the same, and whatever was read of it before.
#[test]
fn hole_that_the_seal_knows_as_data_is_an_error_and_never_zeroes() {
    let mut expected = content();
    // A chunk of nothing but data, and one that is half a hole.
    let (data_at, half_at) = (65_536_u64, 131_072_u64);
    expected[data_at as usize..half_at as usize].fill(5);
    expected[half_at as usize..half_at as usize + 32_768].fill(6);
    expected[half_at as usize + 32_768..half_at as usize + 65_536].fill(0);
    let server = Server::start(Manners::new(expected.clone()));
    let dir = tempfile::tempdir().unwrap();
    let manifest = dir.path().join("golden.manifest");
    seal_to(&open(&server, PATIENCE), &manifest, &AtomicBool::new(false), &mut |_| ()).unwrap();
    for was_read in [false, true] {
        for lies_at in [data_at, half_at + 4096] {
            server.set(|manners| manners.lies_at = Some(lies_at));
            let base = open(&server, PATIENCE).sealed(Seal::at(&manifest).unwrap().unwrap()).unwrap();
            if was_read {
                assert_reads(&base, &expected, 0, SIZE);
            }
            let error = text(&base.content_at(lies_at, 4096).unwrap_err());
            assert!(error.contains("none when sealed"), "at {lies_at}, read before: {was_read}: {error}");
            // What is one is one.
            let hole = base.content_at(half_at + 32_768, 8192).unwrap();
            assert_eq!(hole, Content::Hole(8192));
        }
    }
}

use std::{
    io::{Read, Write},
    os::fd::OwnedFd,
};

use rustix::{
    event::{EventfdFlags, eventfd},
    fs::MemfdFlags,
};

use super::*;

const RING_SIZE_MAX: u16 = 256;

struct Recorder {
    starts: Vec<bool>,
    tables: Vec<Uuid>,
    verdict: Result<(), String>,
}

impl Gate for Recorder {
    fn ring_starts(&mut self, start: Start) -> Result<(), String> {
        self.starts.push(start.fresh);
        self.verdict.clone()
    }

    fn writeback(&mut self, _writeback: bool) {}

    fn inflight(&mut self, table: Arc<InflightTable>) {
        self.tables.push(table.token());
    }
}

fn open_gate() -> Recorder {
    Recorder { starts: Vec::new(), tables: Vec::new(), verdict: Ok(()) }
}

/// A relay, the frontend's end, and the library's end.
fn relay() -> (Relay, UnixStream, UnixStream) {
    let (frontend, near) = UnixStream::pair().unwrap();
    let (far, library) = UnixStream::pair().unwrap();
    (Relay::new(near, far, RING_SIZE_MAX), frontend, library)
}

fn bytes(request: FrontendReq, payload: &[u32]) -> Vec<u8> {
    let header = [request as u32, 1, payload.len() as u32 * 4];
    header.iter().chain(payload).flat_map(|word| word.to_ne_bytes()).collect()
}

fn send(socket: &UnixStream, request: FrontendReq, payload: &[u32], fds: &[BorrowedFd<'_>]) {
    let bytes = bytes(request, payload);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(fds)));
    }
    let iov = [std::io::IoSlice::new(&bytes)];
    rustix::net::sendmsg(socket, &iov, &mut control, rustix::net::SendFlags::empty()).unwrap();
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::empty()).unwrap()
}

#[test]
fn relay_between_both_sides_forwards_requests_and_replies() {
    let (mut relay, mut frontend, mut library) = relay();
    let request = bytes(FrontendReq::GET_FEATURES, &[]);
    frontend.write_all(&request).unwrap();
    let reply = bytes(FrontendReq::GET_FEATURES, &[1, 2]);
    library.write_all(&reply).unwrap();
    assert_eq!(relay.forward(&mut open_gate()), None);
    let mut got = vec![0; request.len()];
    library.read_exact(&mut got).unwrap();
    assert_eq!(got, request);
    let mut got = vec![0; reply.len()];
    frontend.read_exact(&mut got).unwrap();
    assert_eq!(got, reply);
}

#[test]
fn relay_asks_at_each_kick_whether_a_ring_may_start() {
    let (mut relay, frontend, library) = relay();
    let mut gate = open_gate();
    let kick = event();
    send(&frontend, FrontendReq::SET_VRING_BASE, &[0, 0], &[]);
    send(&frontend, FrontendReq::SET_VRING_KICK, &[0, 0], &[kick.as_fd()]);
    send(&frontend, FrontendReq::SET_VRING_BASE, &[1, 17], &[]);
    send(&frontend, FrontendReq::SET_VRING_KICK, &[1, 0], &[kick.as_fd()]);
    send(&frontend, FrontendReq::SET_VRING_BASE, &[1, 0], &[]);
    send(&frontend, FrontendReq::SET_VRING_KICK, &[1, 0], &[kick.as_fd()]);
    send(&frontend, FrontendReq::SET_VRING_KICK, &[0x101, 0], &[]);
    assert_eq!(relay.forward(&mut gate), None);
    assert_eq!(gate.starts, [true, false, true]);
    let mut reader = Reader::default();
    let fds: Vec<usize> = std::iter::from_fn(|| match reader.read(&library) {
        Received::Message(message) => Some(message.fds.len()),
        _ => None,
    })
    .collect();
    assert_eq!(fds, [0, 1, 0, 1, 0, 1, 0]);
}

/// No session begins or ends for what the library will refuse.
#[test]
fn relay_refuses_a_kick_that_is_malformed_before_it_asks() {
    let kick = event();
    let cases: [(&[u32], &[BorrowedFd<'_>]); 3] =
        [(&[0, 0], &[]), (&[0, 0], &[kick.as_fd(), kick.as_fd()]), (&[0], &[kick.as_fd()])];
    for (payload, fds) in cases {
        let (mut relay, frontend, _library) = relay();
        let mut gate = open_gate();
        send(&frontend, FrontendReq::SET_VRING_KICK, payload, fds);
        let refused = Ending::Refused("the start of a ring is malformed".to_owned());
        assert_eq!(relay.forward(&mut gate), Some(refused));
        assert!(gate.starts.is_empty());
    }
}

#[test]
fn relay_with_a_shut_gate_forwards_no_kick() {
    let (mut relay, frontend, mut library) = relay();
    let mut gate = Recorder { starts: Vec::new(), tables: Vec::new(), verdict: Err("no room".to_owned()) };
    send(&frontend, FrontendReq::SET_VRING_KICK, &[0, 0], &[event().as_fd()]);
    assert_eq!(relay.forward(&mut gate), Some(Ending::Refused("no room".to_owned())));
    assert!(relay.hand_over().is_none());
    assert_eq!(library.read(&mut [0; 64]).unwrap(), 0);
}

#[test]
fn relay_given_a_kick_or_call_that_is_no_eventfd_refuses() {
    for request in [FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_CALL] {
        let (mut relay, frontend, _library) = relay();
        let file = tempfile::tempfile().unwrap();
        send(&frontend, request, &[0, 0], &[file.as_fd()]);
        assert!(matches!(relay.forward(&mut open_gate()), Some(Ending::Refused(_))));
    }
}

/// Invariant 8: its queue's thread would count it down for ever.
#[test]
fn relay_given_a_kick_that_is_a_semaphore_refuses() {
    let semaphore = eventfd(7, EventfdFlags::SEMAPHORE).unwrap();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", semaphore.as_raw_fd())).unwrap();
    if !info.contains("eventfd-semaphore") {
        eprintln!("not looked at, the kernel does not tell: {info}");
        return;
    }
    let (mut relay, frontend, _library) = relay();
    send(&frontend, FrontendReq::SET_VRING_CALL, &[0, 0], &[semaphore.as_fd()]);
    assert_eq!(relay.forward(&mut open_gate()), None);
    send(&frontend, FrontendReq::SET_VRING_KICK, &[0, 0], &[semaphore.as_fd()]);
    let why = "a ring's kick descriptor is a semaphore".to_owned();
    assert_eq!(relay.forward(&mut open_gate()), Some(Ending::Refused(why)));
}

#[test]
fn relay_tells_which_side_has_ended() {
    let (mut one, frontend, _library) = relay();
    drop(frontend);
    assert_eq!(one.forward(&mut open_gate()), Some(Ending::Frontend));
    let (mut one, _frontend, library) = relay();
    drop(library);
    assert_eq!(one.forward(&mut open_gate()), Some(Ending::Library));
}

#[test]
fn relay_of_a_frontend_that_never_reads_does_not_grow_or_block() {
    let (mut relay, _frontend, mut library) = relay();
    library.set_nonblocking(true).unwrap();
    let reply = long(FrontendReq::GET_CONFIG);
    let mut written = 0;
    // Ends when both sockets are full and the relay holds its one message.
    while library.write(&reply).is_ok_and(|n| n == reply.len()) && written < 10_000 {
        written += 1;
        assert_eq!(relay.forward(&mut open_gate()), None);
    }
    assert!(written < 10_000);
    let asked: Vec<_> = relay.interest().map(|(_, events)| events).collect();
    assert_eq!(asked, [PollFlags::IN | PollFlags::OUT | PollFlags::RDHUP]);
}

/// A message of the longest kind.
fn long(request: FrontendReq) -> Vec<u8> {
    let mut message = bytes(request, &[]);
    message[8..12].copy_from_slice(&4096u32.to_ne_bytes());
    message.resize(12 + 4096, 7);
    message
}

/// Writes `message` to `from` until nothing moves any more: the sockets are full, and the relay holds its one message.
fn fill(relay: &mut Relay, mut from: &UnixStream, message: &[u8]) {
    from.set_nonblocking(true).unwrap();
    while from.write(message).is_ok_and(|n| n == message.len()) {
        assert_eq!(relay.forward(&mut open_gate()), None);
    }
}

/// Whether a wait for the relay's descriptors ends at once.
fn is_woken(relay: &Relay) -> bool {
    let mut fds: Vec<_> = relay.interest().map(|(fd, events)| PollFd::from_borrowed_fd(fd, events)).collect();
    rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

/// Invariant 8: its hang-up would be told to no end.
#[test]
fn relay_whose_library_is_gone_and_whose_frontend_never_reads_sleeps_until_it_does() {
    for reads in [true, false] {
        let (mut relay, mut frontend, library) = relay();
        fill(&mut relay, &library, &long(FrontendReq::GET_CONFIG));
        drop(library);
        assert_eq!(relay.forward(&mut open_gate()), None);
        assert!(!is_woken(&relay));
        if reads {
            let mut part = [0; 4096];
            frontend.set_nonblocking(true).unwrap();
            let ending = loop {
                assert!(frontend.read(&mut part).is_ok_and(|n| n > 0));
                if is_woken(&relay)
                    && let Some(ending) = relay.forward(&mut open_gate())
                {
                    break ending;
                }
            };
            assert_eq!(ending, Ending::Library);
        } else {
            drop(frontend);
            assert!(is_woken(&relay));
            assert_eq!(relay.forward(&mut open_gate()), Some(Ending::Frontend));
        }
    }
}

/// Invariant 8: a library that is held up is not waited for by who is gone.
#[test]
fn relay_whose_frontend_is_gone_and_whose_library_does_not_read_ends() {
    let (mut relay, frontend, _library) = relay();
    fill(&mut relay, &frontend, &long(FrontendReq::SET_CONFIG));
    assert!(!is_woken(&relay));
    drop(frontend);
    assert!(is_woken(&relay));
    assert_eq!(relay.forward(&mut open_gate()), Some(Ending::Frontend));
}

/// Invariant 8: the library would keep the old size, and write a line to the log for each message.
#[test]
fn relay_given_an_impossible_ring_size_refuses() {
    for size in [1, 2, 128, 256] {
        let (mut relay, frontend, library) = relay();
        send(&frontend, FrontendReq::SET_VRING_NUM, &[1, size], &[]);
        assert_eq!(relay.forward(&mut open_gate()), None, "{size}");
        assert!(matches!(Reader::default().read(&library), Received::Message(_)));
    }
    for size in [0, 3, 100, 257, 512, 0x1_0000, 0x1_0100, u32::MAX] {
        let (mut relay, frontend, library) = relay();
        send(&frontend, FrontendReq::SET_VRING_NUM, &[1, size], &[]);
        let why = format!("ring 1 is to have {size} elements, expected a power of two up to 256");
        assert_eq!(relay.forward(&mut open_gate()), Some(Ending::Refused(why)));
        assert!(matches!(Reader::default().read(&library), Received::Wait | Received::End));
    }
}

/// A region's address, size, user address and offset in its file, in words.
fn region(address: u64, size: u64, offset: u64) -> impl Iterator<Item = u32> {
    [address, size, address, offset].into_iter().flat_map(|long| [long as u32, (long >> 32) as u32])
}

/// Invariant 8: the first access would be a SIGBUS.
#[test]
fn relay_given_memory_beyond_the_end_of_its_file_refuses() {
    let file = |len| {
        let file = std::fs::File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    };
    let (large, small) = (file(0x4000), file(0x2000 - 1));
    let device = std::fs::File::open("/dev/zero").unwrap();
    for (size, offset, verdict) in [
        // Its last page is there as a whole.
        (0x2000, 0, None),
        (0x1000, 0x1000, None),
        (0x3000, 0, Some(0x3000)),
        (0x1000, 0x2000, Some(0x3000)),
        (u64::MAX, u64::MAX, Some(2 * u128::from(u64::MAX))),
    ] {
        let expected = verdict.map(|needed| {
            let why = format!(
                "memory region at 0x100000000: it needs a file of {needed} bytes, its file has {}",
                0x2000 - 1
            );
            Ending::Refused(why)
        });
        let of_small = region(1 << 32, size, offset);
        let one: Vec<u32> = [0, 0].into_iter().chain(of_small).collect();
        let table =
            |second| -> Vec<u32> { [2, 0].into_iter().chain(region(0, 0x4000, 0)).chain(second).collect() };
        let files = [large.as_fd(), small.as_fd()];
        for (request, payload, fds) in [
            (FrontendReq::ADD_MEM_REG, &one, &files[1..]),
            (FrontendReq::SET_MEM_TABLE, &table(region(1 << 32, size, offset)), &files[..]),
        ] {
            let (mut relay, frontend, library) = relay();
            send(&frontend, request, payload, fds);
            assert_eq!(relay.forward(&mut open_gate()), expected, "{size:#x} at {offset:#x}");
            let forwarded = matches!(Reader::default().read(&library), Received::Message(_));
            assert_eq!(forwarded, expected.is_none());
        }
    }
    let (mut relay, frontend, _library) = relay();
    let one: Vec<u32> = [0, 0].into_iter().chain(region(1 << 32, 0x3000, 0x1000)).collect();
    send(&frontend, FrontendReq::ADD_MEM_REG, &one, &[device.as_fd()]);
    assert_eq!(relay.forward(&mut open_gate()), None, "nobody knows how large a device is");
}

/// Invariant 8: with no address space left the next allocation would end us.
#[test]
fn relay_given_more_memory_than_there_is_address_space_for_refuses() {
    const HALF: u64 = 8 << 40;
    let file = std::fs::File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(HALF).unwrap();
    let single = |address| -> Vec<u32> { [0, 0].into_iter().chain(region(address, HALF, 0)).collect() };
    let (mut relay, frontend, _library) = relay();
    let mut said = |request, payload: &[u32], count: usize| {
        send(&frontend, request, payload, &vec![file.as_fd(); count]);
        match relay.forward(&mut open_gate()) {
            None => true,
            Some(Ending::Refused(why)) => {
                assert_eq!(
                    why,
                    format!("memory regions of {} bytes: {} are the most there may be", 3 * HALF, 2 * HALF)
                );
                false
            }
            other => panic!("{other:?}"),
        }
    };
    for (request, address, fits) in [
        (FrontendReq::ADD_MEM_REG, 0, true),
        (FrontendReq::ADD_MEM_REG, HALF, true),
        (FrontendReq::ADD_MEM_REG, 2 * HALF, false),
        (FrontendReq::REM_MEM_REG, HALF, true),
        (FrontendReq::ADD_MEM_REG, 2 * HALF, true),
    ] {
        assert_eq!(said(request, &single(address), 1), fits, "{request:?} of {address:#x}");
    }
    for count in [2, 3] {
        let regions = (0..count).flat_map(|index| region(index * HALF, HALF, 0));
        let table: Vec<u32> = [count as u32, 0].into_iter().chain(regions).collect();
        assert_eq!(said(FrontendReq::SET_MEM_TABLE, &table, count as usize), count == 2);
    }
}

//! A frontend's connection, handed from one server to the next.
//!
//! A server that stops in order leaves the rings as they are after the last request was answered, and
//! the connection open. The next one, in another process, gets the connection and what the frontend
//! had set up over it, and goes on: the frontend notices nothing but that its guest's requests took a
//! little longer. The in-flight table says where the rings go on.
//!
//! Between the two, somebody keeps descriptors: a service manager, for example (`FDSTORE=1` of
//! `sd_notify(3)`). The first is a file in memory that says what the others are. Each open file is kept once, however often it
//! was sent (guests' memory is often several regions of one): systemd keeps none twice, whatever its name.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::{fs::FileExt, net::UnixStream},
    },
};

use rustix::fs::MemfdFlags;

use crate::open_file;
use crate::wire::{FDS_MAX, HEADER_LEN, Message, PAYLOAD_MAX};

/// "PRISHOV" and the version of the format: the number of messages, and of each its length, the number of its descriptors, the
/// place of each among those that are kept, and its bytes. Numbers have 32 bits, the lowest first.
const MAGIC: u64 = u64::from_le_bytes(*b"PRISHOV2");
/// The first one named no places: all descriptors were kept, in the order of the messages.
const MAGIC_IN_ORDER: u64 = u64::from_le_bytes(*b"PRISHOV1");
/// The place of the frontend's connection; that of the first that came with a message.
const FRONTEND: usize = 1;
const FIRST: usize = 2;
/// Most messages that are taken.
const MESSAGES_MAX: u32 = 1024;

/// See the module.
#[derive(Debug)]
pub struct HandOver {
    pub(crate) frontend: UnixStream,
    pub(crate) setup: VecDeque<Message>,
}

impl HandOver {
    /// What has to be kept for the next server, in this order. The second one is the frontend's
    /// connection: whoever kept a copy and gives up must shut it down, or the frontend waits for ever.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn into_fds(self) -> io::Result<Vec<OwnedFd>> {
        let mut state = File::from(rustix::fs::memfd_create("pristine-handover", MemfdFlags::CLOEXEC)?);
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        let number = |bytes: &mut Vec<u8>, number: usize| bytes.extend((number as u32).to_le_bytes());
        number(&mut bytes, self.setup.len());
        let mut others = vec![OwnedFd::from(self.frontend)];
        for mut message in self.setup {
            let fds = std::mem::take(&mut message.fds);
            number(&mut bytes, message.bytes().len());
            number(&mut bytes, fds.len());
            for fd in fds {
                let known = others.iter().position(|other| open_file::is_one(other.as_fd(), fd.as_fd()));
                number(&mut bytes, FRONTEND + known.unwrap_or(others.len()));
                if known.is_none() {
                    others.push(fd);
                }
            }
            bytes.extend_from_slice(message.bytes());
        }
        state.write_all(&bytes)?;
        Ok([OwnedFd::from(state)].into_iter().chain(others).collect())
    }

    /// What another server has left.
    ///
    /// # Errors
    /// If it is not complete, or was left by a version that this one does not know; then everything is
    /// closed, and the frontend has to connect again.
    pub fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Self> {
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        let mut take = |place: usize| fds.get_mut(place).and_then(Option::take).ok_or_else(missing);
        let mut state = FromStart { file: File::from(take(0)?), at: 0 };
        let frontend = take(FRONTEND)?;
        if rustix::net::sockopt::socket_acceptconn(&frontend) != Ok(false) {
            return Err(invalid("the frontend's descriptor is not a connection"));
        }
        let said = messages(&mut state)?;
        let mut named = BTreeMap::<usize, usize>::new();
        said.iter().flat_map(|(_, places)| places).for_each(|place| *named.entry(*place).or_default() += 1);
        // No more of them are open at a time than have to be.
        let mut give = |place: usize| {
            let left = named.entry(place).or_default();
            *left = left.saturating_sub(1);
            let kept = fds.get_mut(place).ok_or_else(missing)?;
            let fd = if *left > 0 { kept.as_ref().map(OwnedFd::try_clone).transpose()? } else { kept.take() };
            fd.ok_or_else(missing)
        };
        let mut setup = VecDeque::new();
        for (bytes, places) in said {
            let fds = places.into_iter().map(&mut give).collect::<io::Result<_>>()?;
            setup.push_back(Message::said_again(bytes, fds));
        }
        Ok(Self { frontend: UnixStream::from(frontend), setup })
    }
}

/// The messages of a state, each with the places of its descriptors.
fn messages(state: &mut FromStart) -> io::Result<Vec<(Vec<u8>, Vec<usize>)>> {
    let in_order = match state.number::<8>()? {
        MAGIC => false,
        MAGIC_IN_ORDER => true,
        _ => return Err(invalid("it was left by another version")),
    };
    let count = state.number::<4>()?;
    if count > u64::from(MESSAGES_MAX) {
        return Err(invalid("it has too many messages"));
    }
    let (mut said, mut next) = (Vec::new(), FIRST..);
    for _ in 0..count {
        let (len, with) = (state.number::<4>()? as usize, state.number::<4>()? as usize);
        if !(HEADER_LEN..=HEADER_LEN + PAYLOAD_MAX).contains(&len) || with > FDS_MAX {
            return Err(invalid("a message is not possible"));
        }
        let places = match in_order {
            true => next.by_ref().take(with).collect(),
            false => (0..with).map(|_| Ok(state.number::<4>()? as usize)).collect::<io::Result<_>>()?,
        };
        let mut message = vec![0; len];
        state.read_exact(&mut message)?;
        said.push((message, places));
    }
    Ok(said)
}

/// Takes these descriptors, which this process inherited for nothing else. To be called before it opens
/// anything: a number that was not inherited could be somebody else's by then.
///
/// # Errors
/// If one of them is not open; then none is taken.
pub fn inherited_fds(numbers: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    for number in numbers {
        // SAFETY: only asks whether the number is open.
        if *number <= 2 || unsafe { libc::fcntl(*number, libc::F_GETFD) } < 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
    }
    let take = |number: &RawFd| {
        // SAFETY: the descriptor is open, and whoever started us handed it over to be ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(*number) };
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        Ok(fd)
    };
    numbers.iter().map(take).collect()
}

fn missing() -> io::Error {
    invalid("a descriptor is missing")
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Reads a file from its start, whatever its position is.
struct FromStart {
    file: File,
    at: u64,
}

impl FromStart {
    fn number<const N: usize>(&mut self) -> io::Result<u64> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

impl Read for FromStart {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buf, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn handover() -> (HandOver, UnixStream) {
        let (frontend, other) = UnixStream::pair().unwrap();
        let message = |request, fds| Message::reply(request, &[request as u8; 40], fds);
        let file = tempfile::tempfile().unwrap().into();
        (HandOver { frontend, setup: [message(2, Vec::new()), message(5, vec![file])].into() }, other)
    }

    #[test]
    fn handover_kept_as_descriptors_is_the_same() {
        let (handover, mut other) = handover();
        let expected: Vec<_> = handover.setup.iter().map(|message| message.bytes().to_vec()).collect();
        let fds = handover.into_fds().unwrap();
        assert_eq!(fds.len(), 3);
        let mut again = HandOver::from_fds(fds).unwrap();
        assert_eq!(again.setup.iter().map(|m| m.bytes().to_vec()).collect::<Vec<_>>(), expected);
        assert_eq!(again.setup.iter().map(|m| m.fds.len()).collect::<Vec<_>>(), [0, 1]);
        other.write_all(b"x").unwrap();
        again.frontend.read_exact(&mut [0]).unwrap();
    }

    /// Invariant 3: what is kept twice is dropped by systemd, and the connection would be lost.
    #[test]
    fn handover_keeps_each_open_file_once_and_gives_it_to_each_message_that_had_it() {
        let (mut handover, _other) = handover();
        let file = || File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (memory, more, kick, call) = (file(), file(), event(), event());
        let again = |file: &File| OwnedFd::from(file.try_clone().unwrap());
        handover.setup = [
            Message::reply(5, &[5; 8], vec![again(&memory), again(&more), again(&memory)]),
            Message::reply(13, &[1; 8], vec![call.try_clone().unwrap()]),
            Message::reply(12, &[0; 8], vec![kick.try_clone().unwrap()]),
            Message::reply(12, &[1; 8], vec![kick.try_clone().unwrap()]),
            Message::reply(37, &[2; 8], vec![again(&memory)]),
        ]
        .into();
        let fds = handover.into_fds().unwrap();
        assert_eq!(fds.len(), 2 + 4);
        for (index, fd) in fds.iter().enumerate() {
            assert!(fds[..index].iter().all(|other| !open_file::is_one(other.as_fd(), fd.as_fd())));
        }
        let again = HandOver::from_fds(fds).unwrap();
        let (memory, more) = (OwnedFd::from(memory), OwnedFd::from(more));
        let expected = [vec![&memory, &more, &memory], vec![&call], vec![&kick], vec![&kick], vec![&memory]];
        assert_eq!(again.setup.len(), expected.len());
        for (message, expected) in again.setup.iter().zip(expected) {
            assert_eq!(message.fds.len(), expected.len());
            let mut both = message.fds.iter().zip(expected);
            assert!(both.all(|(fd, expected)| open_file::is_one(fd.as_fd(), expected.as_fd())));
        }
    }

    /// Invariant 3: an upgrade from a version that kept descriptors in order.
    #[test]
    fn handover_of_the_first_format_is_understood() {
        let (frontend, _other) = UnixStream::pair().unwrap();
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        let files = [file(), file(), file()];
        let mut bytes = b"PRISHOV1".to_vec();
        bytes.extend(3u32.to_le_bytes());
        for (request, count) in [(5u32, 2u32), (2, 0), (12, 1)] {
            let message = Message::reply(request, &[7; 8], Vec::new());
            bytes.extend([message.bytes().len() as u32, count].iter().flat_map(|word| word.to_le_bytes()));
            bytes.extend(message.bytes());
        }
        let state = tempfile::tempfile().unwrap();
        state.write_all_at(&bytes, 0).unwrap();
        let kept = files.each_ref().map(|file| file.try_clone().unwrap());
        let fds = [state.into(), frontend.into()].into_iter().chain(kept).collect();
        let handover = HandOver::from_fds(fds).unwrap();
        assert_eq!(handover.setup.iter().map(|m| m.request()).collect::<Vec<_>>(), [5, 2, 12]);
        assert_eq!(handover.setup.iter().map(|m| m.fds.len()).collect::<Vec<_>>(), [2, 0, 1]);
        let given = handover.setup.iter().flat_map(|message| &message.fds);
        assert!(given.zip(&files).all(|(fd, file)| open_file::is_one(fd.as_fd(), file.as_fd())));
    }

    /// Invariant 8: whatever was kept, it is understood wholly or not at all.
    #[test]
    fn handover_that_is_incomplete_or_changed_is_refused() {
        let fds = || handover().0.into_fds().unwrap();
        for missing in 0..3 {
            let mut fds = fds();
            fds.remove(missing);
            assert!(HandOver::from_fds(fds).is_err(), "{missing}");
        }
        for len in 0..100 {
            let fds = fds();
            rustix::fs::ftruncate(fds[0].as_fd(), len).unwrap();
            assert!(HandOver::from_fds(fds).is_err(), "{len}");
        }
        // Places that there are not, or that are no message's. (The second message is the last thing, its place before it.)
        for place in [0, FRONTEND, 3, u32::MAX as usize] {
            let fds = fds();
            let at = 8 + 4 + (8 + 12 + 40) + 8;
            let state = File::from(fds[0].try_clone().unwrap());
            state.write_all_at(&(place as u32).to_le_bytes(), at).unwrap();
            assert!(HandOver::from_fds(fds).is_err(), "{place}");
        }
        // Magic, number of messages, length and descriptors of the first.
        for at in 0..20 {
            let fds = fds();
            File::from(fds[0].try_clone().unwrap()).write_all_at(&[0xff], at).unwrap();
            assert!(HandOver::from_fds(fds).is_err(), "{at}");
        }
    }
}

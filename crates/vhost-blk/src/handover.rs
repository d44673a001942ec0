//! A frontend's connection, handed from one server to the next.
//!
//! A server that stops in order leaves the rings as they are after the last request was answered, and
//! the connection open. The next one, in another process, gets the connection and what the frontend
//! had set up over it, and goes on: the frontend notices nothing but that its guest's requests took a
//! little longer. The in-flight table says where the rings go on.
//!
//! Between the two, somebody keeps descriptors: a service manager, for example (`FDSTORE=1` of
//! `sd_notify(3)`). The first is a file in memory that says what the others are.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{fs::FileExt, net::UnixStream},
    },
};

use rustix::fs::MemfdFlags;

use crate::wire::{FDS_MAX, HEADER_LEN, Message, PAYLOAD_MAX};

/// "PRISHOV" and the version of the format.
const MAGIC: u64 = u64::from_le_bytes(*b"PRISHOV1");
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
        bytes.extend_from_slice(&(self.setup.len() as u32).to_le_bytes());
        let mut others = vec![OwnedFd::from(self.frontend)];
        for message in self.setup {
            bytes.extend_from_slice(&(message.bytes().len() as u32).to_le_bytes());
            bytes.extend_from_slice(&(message.fds.len() as u32).to_le_bytes());
            bytes.extend_from_slice(message.bytes());
            others.extend(message.fds);
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
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| invalid("a descriptor is missing"));
        let state = File::from(next()?);
        let frontend = next()?;
        if rustix::net::sockopt::socket_acceptconn(&frontend) != Ok(false) {
            return Err(invalid("the frontend's descriptor is not a connection"));
        }
        let mut bytes = FromStart { file: state, at: 0 };
        if bytes.number::<8>()? != MAGIC {
            return Err(invalid("it was left by another version"));
        }
        let count = bytes.number::<4>()?;
        if count > u64::from(MESSAGES_MAX) {
            return Err(invalid("it has too many messages"));
        }
        let mut setup = VecDeque::new();
        for _ in 0..count {
            let (len, with) = (bytes.number::<4>()? as usize, bytes.number::<4>()? as usize);
            if !(HEADER_LEN..=HEADER_LEN + PAYLOAD_MAX).contains(&len) || with > FDS_MAX {
                return Err(invalid("a message is not possible"));
            }
            let mut message = vec![0; len];
            bytes.read_exact(&mut message)?;
            let fds = (0..with).map(|_| next()).collect::<io::Result<_>>()?;
            setup.push_back(Message::said_again(message, fds));
        }
        Ok(Self { frontend: UnixStream::from(frontend), setup })
    }
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
    use std::os::fd::AsFd;

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
        // Magic, number of messages, length and descriptors of the first.
        for at in 0..20 {
            let fds = fds();
            File::from(fds[0].try_clone().unwrap()).write_all_at(&[0xff], at).unwrap();
            assert!(HandOver::from_fds(fds).is_err(), "{at}");
        }
    }
}

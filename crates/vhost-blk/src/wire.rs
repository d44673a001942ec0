//! vhost-user messages on a socket: a header of 12 bytes, a payload, and descriptors that travel
//! with the first byte. Reading and writing never block, and hold at most one message.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};

/// Request, flags and payload size: three numbers in the machine's byte order.
pub(crate) const HEADER_LEN: usize = 12;
/// Longest payload that is forwarded; the library takes no longer one.
pub(crate) const PAYLOAD_MAX: usize = 4096;
/// Most descriptors of a message; the library takes no more.
pub(crate) const FDS_MAX: usize = 32;
/// Most descriptors that the kernel sends at once.
const KERNEL_FDS_MAX: usize = 253;

/// A whole message.
#[derive(Debug)]
pub(crate) struct Message {
    /// Header and payload.
    bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Flags of a message: bits 0 and 1 are the version, which is 1.
const VERSION: u32 = 1;
/// The message is a reply.
const REPLY: u32 = 1 << 2;
/// The sender wants to be told when it is done.
const NEED_REPLY: u32 = 1 << 3;

impl Message {
    /// An answer to `request`.
    pub(crate) fn reply(request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Self {
        let header = [request, VERSION | REPLY, payload.len() as u32];
        let header = header.into_iter().flat_map(u32::to_ne_bytes);
        Self { bytes: header.chain(payload.iter().copied()).collect(), fds }
    }

    /// The same message, for a receiver who is not to answer.
    pub(crate) fn to_say_again(&self) -> io::Result<Self> {
        let fds = self.fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        Ok(Self::said_again(self.bytes.clone(), fds))
    }

    /// A message of these bytes, at least a header, for a receiver who is not to answer.
    pub(crate) fn said_again(mut bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Self {
        let flags = word(&bytes, 1) & !NEED_REPLY;
        if let Some(place) = bytes.get_mut(4..8) {
            place.copy_from_slice(&flags.to_ne_bytes());
        }
        Self { bytes, fds }
    }

    /// Header and payload.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether its sender wants to be told when it is done (protocol feature REPLY_ACK).
    pub(crate) fn needs_reply(&self) -> bool {
        word(&self.bytes, 1) & NEED_REPLY != 0
    }

    /// What is asked for or answered.
    pub(crate) fn request(&self) -> u32 {
        word(&self.bytes, 0)
    }

    /// What comes after the header.
    pub(crate) fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..).unwrap_or_default()
    }

    /// Length of the payload in bytes.
    pub(crate) fn payload_len(&self) -> usize {
        self.payload().len()
    }

    /// The `index`-th 32-bit number of the payload, 0 if it is not that long.
    pub(crate) fn payload_word(&self, index: usize) -> u32 {
        word(&self.bytes, HEADER_LEN / 4 + index)
    }

    /// The 64-bit number of the payload that begins with its `index`-th 32-bit one, 0 if it is not that long.
    pub(crate) fn payload_long(&self, index: usize) -> u64 {
        let bytes = self.bytes.get(HEADER_LEN + 4 * index..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let word = bytes.as_chunks::<4>().0.get(index);
    word.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// What a read brought.
#[derive(Debug)]
pub(crate) enum Received {
    Message(Message),
    /// Nothing more for now.
    Wait,
    /// The other side has closed its end, or broken the connection.
    End,
    /// It is no message that may be forwarded.
    Violation(&'static str),
}

/// Puts messages together from what a socket brings.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reader {
    /// Reads until a message is complete.
    pub(crate) fn read(&mut self, socket: impl AsFd) -> Received {
        loop {
            let wanted = match self.wanted() {
                Ok(0) => {
                    let bytes = std::mem::take(&mut self.bytes);
                    return Received::Message(Message { bytes, fds: std::mem::take(&mut self.fds) });
                }
                Ok(wanted) => wanted,
                Err(violation) => return Received::Violation(violation),
            };
            match self.receive(socket.as_fd(), wanted) {
                Ok(0) => return Received::End,
                Ok(_) if self.fds.len() > FDS_MAX => {
                    return Received::Violation("a message has too many descriptors");
                }
                Ok(_) => {}
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Received::Wait,
                Err(Errno::MSGSIZE) => return Received::Violation("descriptors of a message were lost"),
                Err(_) => return Received::End,
            }
        }
    }

    /// How many bytes the message still lacks, as far as that is known.
    fn wanted(&self) -> Result<usize, &'static str> {
        if self.bytes.len() < HEADER_LEN {
            return Ok(HEADER_LEN - self.bytes.len());
        }
        let payload = word(&self.bytes, 2) as usize;
        if payload > PAYLOAD_MAX {
            return Err("a message is too long");
        }
        Ok((HEADER_LEN + payload).saturating_sub(self.bytes.len()))
    }

    fn receive(&mut self, socket: impl AsFd, wanted: usize) -> rustix::io::Result<usize> {
        let mut buffer = [0; PAYLOAD_MAX];
        let buffer = buffer.get_mut(..wanted).ok_or(Errno::INVAL)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Errno::MSGSIZE);
        }
        self.bytes.extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
        Ok(received.bytes)
    }
}

impl Reader {
    /// Whether a message has begun that is not complete.
    pub(crate) fn is_in_message(&self) -> bool {
        !self.bytes.is_empty() || !self.fds.is_empty()
    }
}

/// Sends one message at a time.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pending: Option<Message>,
    sent: usize,
}

impl Writer {
    /// Whether a message waits to be sent.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Takes a message; only when none is pending.
    pub(crate) fn put(&mut self, message: Message) {
        self.pending = Some(message);
        self.sent = 0;
    }

    /// Sends as much as the socket takes. True: nothing is pending any more.
    pub(crate) fn flush(&mut self, socket: impl AsFd) -> io::Result<bool> {
        while let Some(message) = &mut self.pending {
            let rest = message.bytes.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                self.pending = None;
                break;
            }
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(socket.as_fd(), &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => {
                    self.sent += sent;
                    // They have travelled with the first byte.
                    message.fds.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::unix::net::UnixStream,
    };

    use proptest::prelude::*;

    use super::*;

    fn message(request: u32, payload: &[u8], fds: usize) -> Message {
        let words = [request, 1, payload.len() as u32];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(payload);
        let file = |n: usize| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[n as u8]).unwrap();
            file.into()
        };
        Message { bytes, fds: (0..fds).map(file).collect() }
    }

    #[test]
    fn message_sent_with_descriptors_arrives_with_them() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut writer = Writer::default();
        writer.put(message(5, &[7; 40], 8));
        assert!(writer.flush(&one).unwrap() && !writer.is_pending());
        let Received::Message(got) = Reader::default().read(&other) else { panic!() };
        assert_eq!((got.request(), got.payload_word(1), got.payload_word(10)), (5, 0x0707_0707, 0));
        assert_eq!(got.fds.len(), 8);
        for (n, fd) in got.fds.into_iter().enumerate() {
            let mut file = File::from(fd);
            file.rewind().unwrap();
            let mut byte = [0];
            file.read_exact(&mut byte).unwrap();
            assert_eq!(usize::from(byte[0]), n);
        }
    }

    #[test]
    fn message_that_arrives_byte_by_byte_is_put_together() {
        let (mut one, other) = UnixStream::pair().unwrap();
        let mut reader = Reader::default();
        let bytes = message(1, &[1, 2, 3], 0).bytes;
        let (last, first) = bytes.split_last().unwrap();
        for byte in first {
            one.write_all(&[*byte]).unwrap();
            assert!(matches!(reader.read(&other), Received::Wait));
        }
        one.write_all(&[*last]).unwrap();
        assert!(matches!(reader.read(&other), Received::Message(got) if got.bytes == bytes));
        drop(one);
        assert!(matches!(reader.read(&other), Received::End));
    }

    #[test]
    fn message_that_claims_to_be_too_long_is_a_violation() {
        let (mut one, other) = UnixStream::pair().unwrap();
        let mut header = message(1, &[], 0).bytes;
        header[8..].copy_from_slice(&(PAYLOAD_MAX as u32 + 1).to_ne_bytes());
        one.write_all(&header).unwrap();
        assert!(matches!(Reader::default().read(&other), Received::Violation(_)));
    }

    #[test]
    fn message_with_too_many_descriptors_is_a_violation_and_leaks_none() {
        let (one, other) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); FDS_MAX + 1];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = message(5, &[], 0).bytes;
        sendmsg(&one, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        let mut reader = Reader::default();
        assert!(matches!(reader.read(&other), Received::Violation(_)));
        assert_eq!(reader.fds.len(), FDS_MAX + 1);
    }

    #[test]
    fn message_to_a_full_socket_is_sent_when_there_is_room() {
        let (one, other) = UnixStream::pair().unwrap();
        let (mut writer, mut sent) = (Writer::default(), 0u32);
        let mut reader = Reader::default();
        while !writer.is_pending() {
            writer.put(message(sent, &[9; PAYLOAD_MAX], 0));
            writer.flush(&one).unwrap();
            sent += 1;
        }
        for n in 0..sent {
            let _ = writer.flush(&one).unwrap();
            let Received::Message(got) = reader.read(&other) else { panic!("message {n}") };
            assert_eq!((got.request(), got.bytes.len()), (n, HEADER_LEN + PAYLOAD_MAX));
        }
        assert!(!writer.is_pending());
    }

    #[test]
    fn flush_to_a_closed_socket_is_an_error_without_a_signal() {
        let (one, other) = UnixStream::pair().unwrap();
        drop(other);
        let mut writer = Writer::default();
        writer.put(message(1, &[], 0));
        assert!(writer.flush(&one).is_err());
    }

    proptest! {
        #[test]
        fn reader_of_any_bytes_never_panics_and_holds_at_most_one_message(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let (mut one, other) = UnixStream::pair().unwrap();
            one.write_all(&bytes).unwrap();
            drop(one);
            let mut reader = Reader::default();
            while let Received::Message(got) = reader.read(&other) {
                prop_assert!(got.bytes.len() <= HEADER_LEN + PAYLOAD_MAX);
            }
            prop_assert!(reader.bytes.len() <= HEADER_LEN + PAYLOAD_MAX);
        }
    }
}

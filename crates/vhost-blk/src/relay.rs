//! The control-plane relay between a frontend and the vhost-user library.
//!
//! It forwards messages with their descriptors in both directions, one at a time per direction:
//! the next one is not read before the last one is written, so that nobody makes it grow. It looks
//! at messages by type: it knows when a ring is about to start, and answers those that the library
//! can't: GET_INFLIGHT_FD and SET_INFLIGHT_FD. Data never passes it.

use std::{
    collections::VecDeque,
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use rustix::event::{PollFd, PollFlags, Timespec};
use uuid::Uuid;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use crate::config;
use crate::handover::HandOver;
use crate::inflight::{InflightTable, Shape};
use crate::regions::Regions;
use crate::setup::Setup;
use crate::wire::{Message, Reader, Received, Writer};

/// Most messages that are forwarded before other descriptors get their turn.
const MESSAGES_PER_TURN: u32 = 64;
/// Payload bit of SET_VRING_KICK and SET_VRING_CALL: there is no descriptor.
const NO_FD: u32 = 0x100;
/// Payload bits of the same that are the number of the ring.
const RING_MASK: u32 = 0xff;
/// Bytes of the payload of a message about a descriptor of a ring.
const KICK_LEN: usize = 8;

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The frontend has closed it.
    Frontend,
    /// The library has closed its side: it did not like a message.
    Library,
    /// We close it, for this reason.
    Refused(String),
}

/// Who decides whether a ring may start.
pub(crate) trait Gate {
    /// A ring is about to start. An error closes the connection.
    fn ring_starts(&mut self, start: Start) -> Result<(), String>;

    /// The guest chooses the mode of its cache.
    fn writeback(&mut self, writeback: bool);

    /// Rings that start from now on note their requests in this table, or go on with what is in it.
    fn inflight(&mut self, table: Arc<InflightTable>);
}

/// What is known of a ring that is about to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// Its number, as the frontend says it.
    pub(crate) ring: u32,
    /// No ring that was not started over this connection is to continue where another left off.
    pub(crate) fresh: bool,
    /// The token of the in-flight table, if there is one.
    pub(crate) token: Option<Uuid>,
}

/// One direction.
#[derive(Debug, Default)]
struct Lane {
    reader: Reader,
    writer: Writer,
}

/// The relay of one connection.
#[derive(Debug)]
pub(crate) struct Relay {
    frontend: UnixStream,
    library: UnixStream,
    requests: Lane,
    replies: Lane,
    /// Rings that are to start elsewhere than at 0, one bit each.
    continued: u64,
    /// Rings that have been started over this connection: where they continue is their own business.
    started: u64,
    /// A request of which we are the one to answer, while the library owes earlier answers.
    postponed: Option<Message>,
    /// Answers that the library owes.
    owed: usize,
    reply_ack: bool,
    /// The token of the in-flight table that was made for this connection, or that its rings run with.
    made: Option<Uuid>,
    /// The table that the frontend has set.
    table: Option<Arc<InflightTable>>,
    /// Rings were started with that table elsewhere: it belongs to rings that run.
    brought: bool,
    regions: Regions,
    /// Most elements of a ring.
    ring_size_max: u32,
    /// What the frontend has set up, if somebody wants to know.
    setup: Option<Setup>,
    /// What it had set up with a server before, to be said again before it says more.
    replay: VecDeque<Message>,
    /// Answers to what was said again, which the frontend has had already. They come before others.
    stale: usize,
}

impl Relay {
    pub(crate) fn new(frontend: UnixStream, library: UnixStream, ring_size_max: u16) -> Self {
        Self {
            ring_size_max: u32::from(ring_size_max),
            setup: None,
            replay: VecDeque::new(),
            stale: 0,
            frontend,
            library,
            requests: Lane::default(),
            replies: Lane::default(),
            continued: 0,
            started: 0,
            postponed: None,
            owed: 0,
            reply_ack: false,
            made: None,
            table: None,
            brought: false,
            regions: Regions::default(),
        }
    }

    /// Takes note of what the frontend sets up, for [`hand_over`](Self::hand_over).
    pub(crate) fn remember(&mut self) {
        self.setup = Some(Setup::default());
    }

    /// Says `setup` before anything that comes from the frontend.
    pub(crate) fn replay(&mut self, setup: VecDeque<Message>) {
        self.replay = setup;
    }

    /// Leaves the frontend connected, for another server; or else closes the connection. The library's
    /// side is ended in any case.
    pub(crate) fn hand_over(self) -> Option<HandOver> {
        let _ = self.library.shutdown(std::net::Shutdown::Both);
        // Without a table nobody knows where the rings go on; in the middle of a message or of an answer
        // the next server would not know what is missing.
        let can = self.table.is_some()
            && self.replay.is_empty()
            && self.postponed.is_none()
            && self.owed == 0
            && !self.requests.reader.is_in_message()
            && !self.replies.reader.is_in_message()
            && !self.requests.writer.is_pending()
            && !self.replies.writer.is_pending()
            && !has_hung_up(&self.frontend);
        match self.setup.and_then(Setup::into_messages).filter(|_| can) {
            Some(setup) => Some(HandOver { frontend: self.frontend, setup }),
            None => {
                let _ = self.frontend.shutdown(std::net::Shutdown::Both);
                None
            }
        }
    }

    /// The descriptors on which there is something to wait for, and what. Where there is not, a hang-up would be told
    /// again and again: the library's matters when replies can be written again, or the next request can't be.
    pub(crate) fn interest(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let read = |full: bool| if full { PollFlags::empty() } else { PollFlags::IN };
        let write = |outward: &Lane| {
            if outward.writer.is_pending() { PollFlags::OUT } else { PollFlags::empty() }
        };
        let full = self.requests.writer.is_pending() || self.postponed.is_some();
        // A frontend that is not read may still go.
        let frontend = read(full) | write(&self.replies) | PollFlags::RDHUP;
        let library = read(self.replies.writer.is_pending()) | write(&self.requests);
        [(self.frontend.as_fd(), frontend), (self.library.as_fd(), library)]
            .into_iter()
            .filter(|(_, events)| !events.is_empty())
    }

    /// Forwards what can be forwarded now. `Some`: the connection is over.
    pub(crate) fn forward(&mut self, gate: &mut dyn Gate) -> Option<Ending> {
        for _ in 0..MESSAGES_PER_TURN as usize + self.replay.len() {
            // Replies first: a frontend that goes away must still get what was said before.
            let replies = self.forward_reply();
            let requests = match replies {
                Err(ending) => return Some(ending),
                Ok(_) => self.forward_request(gate),
            };
            match (replies, requests) {
                (_, Err(ending)) => return Some(ending),
                (Ok(false), Ok(false)) => return None,
                _ => {}
            }
        }
        None
    }

    /// True: a message was taken on.
    fn forward_reply(&mut self) -> Result<bool, Ending> {
        let lane = &mut self.replies;
        if !lane.writer.flush(&self.frontend).map_err(|_| Ending::Frontend)? {
            return Ok(false);
        }
        match lane.reader.read(&self.library) {
            Received::Message(message) => {
                self.owed = self.owed.saturating_sub(1);
                if self.stale > 0 {
                    self.stale -= 1;
                    return Ok(true);
                }
                lane.writer.put(message);
                lane.writer.flush(&self.frontend).map_err(|_| Ending::Frontend)?;
                Ok(true)
            }
            Received::Wait => Ok(false),
            Received::End | Received::Violation(_) => Err(Ending::Library),
        }
    }

    fn forward_request(&mut self, gate: &mut dyn Gate) -> Result<bool, Ending> {
        if !self.requests.writer.flush(&self.library).map_err(|_| Ending::Library)? {
            // The library may be held up by what ends with the connection.
            return if has_hung_up(&self.frontend) { Err(Ending::Frontend) } else { Ok(false) };
        }
        let again = self.postponed.is_none().then(|| self.replay.pop_front()).flatten();
        self.stale += usize::from(again.as_ref().is_some_and(|message| self.is_answered(message)));
        let message = match self.postponed.take().or(again) {
            Some(message) => message,
            None => match self.requests.reader.read(&self.frontend) {
                Received::Message(message) => message,
                Received::Wait => return Ok(false),
                Received::End => return Err(Ending::Frontend),
                Received::Violation(what) => return Err(Ending::Refused(what.to_owned())),
            },
        };
        let request = FrontendReq::try_from(message.request()).ok();
        if let Some(FrontendReq::GET_INFLIGHT_FD | FrontendReq::SET_INFLIGHT_FD) = request {
            // Answers come in the order of the requests.
            if self.owed > 0 || self.replies.writer.is_pending() {
                if has_hung_up(&self.frontend) {
                    return Err(Ending::Frontend);
                }
                self.postponed = Some(message);
                return Ok(false);
            }
            self.note(&message);
            if let Some(reply) = self.answer(message, gate)? {
                self.replies.writer.put(reply);
                self.replies.writer.flush(&self.frontend).map_err(|_| Ending::Frontend)?;
            }
            return Ok(true);
        }
        self.inspect(&message, gate)?;
        self.note(&message);
        self.owed += usize::from(self.is_answered(&message));
        self.requests.writer.put(message);
        self.requests.writer.flush(&self.library).map_err(|_| Ending::Library)?;
        Ok(true)
    }

    fn note(&mut self, message: &Message) {
        if let Some(setup) = &mut self.setup {
            setup.note(message);
        }
    }

    /// Whether the library answers a request.
    fn is_answered(&self, message: &Message) -> bool {
        match FrontendReq::try_from(message.request()) {
            Ok(
                FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_VRING_BASE
                | FrontendReq::GET_CONFIG
                | FrontendReq::GET_MAX_MEM_SLOTS,
            ) => true,
            _ => self.reply_ack && message.needs_reply(),
        }
    }

    /// Answers GET_INFLIGHT_FD and SET_INFLIGHT_FD (vhost-user, "Inflight I/O tracking").
    fn answer(&mut self, mut message: Message, gate: &mut dyn Gate) -> Result<Option<Message>, Ending> {
        let request = message.request();
        let numbers = message.payload_word(4);
        let shape = Shape { queues: numbers as u16, queue_size: (numbers >> 16) as u16 };
        let refuse = |error: std::io::Error| Ending::Refused(format!("its in-flight buffer: {error}"));
        if request == FrontendReq::GET_INFLIGHT_FD as u32 {
            let table = InflightTable::create(shape).map_err(refuse)?;
            let fd = table.as_fd().try_clone_to_owned().map_err(refuse)?;
            self.made = Some(table.token());
            let (size, offset) = (table.bytes().to_ne_bytes(), 0u64.to_ne_bytes());
            let mut payload = [&size[..], &offset[..], &numbers.to_ne_bytes()[..]].concat();
            // QEMU's structure ends with padding, others' does not.
            payload.resize(message.payload_len().clamp(payload.len(), payload.len() + 4), 0);
            return Ok(Some(Message::reply(request, &payload, vec![fd])));
        }
        let fd = message.fds.pop().filter(|_| message.fds.is_empty());
        let fd = fd.ok_or_else(|| refuse(std::io::ErrorKind::InvalidInput.into()))?;
        let table = Arc::new(InflightTable::adopt(fd, shape).map_err(refuse)?);
        self.brought = self.made != Some(table.token()) && table.was_started();
        self.table = Some(table.clone());
        gate.inflight(table);
        let done = 0u64.to_ne_bytes();
        Ok((self.reply_ack && message.needs_reply()).then(|| Message::reply(request, &done, Vec::new())))
    }

    /// Looks at a request before it is forwarded.
    fn inspect(&mut self, message: &Message, gate: &mut dyn Gate) -> Result<(), Ending> {
        match FrontendReq::try_from(message.request()) {
            Ok(FrontendReq::SET_VRING_NUM) => {
                let (ring, size, max) =
                    (message.payload_word(0), message.payload_word(1), self.ring_size_max);
                // Of some of them the library would keep the old one, and say so in the log each time.
                if size.is_power_of_two() && size <= max {
                    return Ok(());
                }
                let why =
                    format!("ring {ring} is to have {size} elements, expected a power of two up to {max}");
                Err(Ending::Refused(why))
            }
            Ok(FrontendReq::SET_VRING_BASE) => {
                let (ring, base) = (message.payload_word(0), message.payload_word(1));
                // The library refuses ring numbers that there are not.
                let bit = 1u64.checked_shl(ring).unwrap_or(0);
                self.continued = if base == 0 { self.continued & !bit } else { self.continued | bit };
                Ok(())
            }
            Ok(FrontendReq::SET_PROTOCOL_FEATURES) => {
                let bits = u64::from(message.payload_word(0));
                self.reply_ack = bits & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
                Ok(())
            }
            Ok(FrontendReq::SET_CONFIG) => {
                // Offset, size and flags come before.
                let bytes = message.payload().get(12..).unwrap_or_default();
                if let Some(writeback) = config::written_writeback(message.payload_word(0), bytes) {
                    gate.writeback(writeback);
                }
                Ok(())
            }
            Ok(FrontendReq::SET_MEM_TABLE) => self.regions.set(message).map_err(Ending::Refused),
            Ok(FrontendReq::ADD_MEM_REG) => self.regions.add(message).map_err(Ending::Refused),
            Ok(FrontendReq::REM_MEM_REG) => {
                self.regions.remove(message);
                Ok(())
            }
            Ok(FrontendReq::SET_VRING_CALL) => events_only(message),
            Ok(FrontendReq::SET_VRING_KICK) => {
                events_only(message)?;
                no_semaphores(message)?;
                if message.payload_word(0) & NO_FD != 0 {
                    return Ok(());
                }
                if message.fds.len() != 1 || message.payload().len() < KICK_LEN {
                    // The library would refuse it when a session has begun for it, or ended.
                    return Err(Ending::Refused("the start of a ring is malformed".to_owned()));
                }
                let ring = message.payload_word(0) & RING_MASK;
                let token = self.table.as_ref().map(|table| table.token());
                let fresh = self.continued & !self.started == 0 && !self.brought;
                gate.ring_starts(Start { ring, fresh, token }).map_err(Ending::Refused)?;
                if let Some(table) = &self.table {
                    table.set_started();
                    // From now on it is this connection's, however often it is set again.
                    self.made = Some(table.token());
                }
                self.started |= 1u64.checked_shl(ring).unwrap_or(0);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Whether nothing more comes from the other side.
fn has_hung_up(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
}

/// A kick or call must be an eventfd. Of other things reads and writes could block a worker.
fn events_only(message: &Message) -> Result<(), Ending> {
    let is_event = |fd: &std::os::fd::OwnedFd| {
        // Where /proc is missing, it is believed.
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_or(true, |target| target.as_os_str() == "anon_inode:[eventfd]")
    };
    if message.fds.iter().all(is_event) {
        Ok(())
    } else {
        Err(Ending::Refused("a ring's kick or call descriptor is not an eventfd".to_owned()))
    }
}

/// Of a kick that is a semaphore a read takes one of what may be 2^64: to no end. An older
/// kernel does not tell, then it is believed.
fn no_semaphores(message: &Message) -> Result<(), Ending> {
    let is_semaphore = |fd: &std::os::fd::OwnedFd| {
        fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).is_ok_and(|info| {
            let value = info.lines().find_map(|line| line.strip_prefix("eventfd-semaphore:"));
            value.is_some_and(|value| value.trim() != "0")
        })
    };
    if message.fds.iter().any(is_semaphore) {
        return Err(Ending::Refused("a ring's kick descriptor is a semaphore".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

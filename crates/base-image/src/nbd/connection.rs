//! One connection to a server: requests and what is answered (`doc/proto.md`, "Transmission phase").
//!
//! A reply counts only if it is of the request, covers all of what was asked for exactly once, and has no error.
//! After anything else nothing is known of what comes next, and the connection is given up.

use std::io::{self, BufReader, Read, Write};
use std::time::{Duration, Instant};

use super::handshake::{Terms, greet, negotiate, start_tls};
use super::hurry::Hurry;
use super::stream::Stream;
use super::uri::NbdUri;
use super::wire::{
    ERROR_LEN_MAX, ERROR_SHUTDOWN, Fields, REPLY_BLOCK_STATUS, REPLY_DONE, REPLY_ERRORS, REPLY_NONE,
    REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE, Request, SIMPLE_REPLY_MAGIC, STATE_ZERO, STRUCTURED_REPLY_MAGIC,
    request,
};

/// Bytes of a status chunk: what servers send at most, 2^20 descriptors.
const STATUS_LEN_MAX: u32 = 4 + (8 << 20);
/// Parts of an answer: 1 MiB in sectors, and twice that.
const PARTS_MAX: usize = 4096;
/// How long a good-bye may take.
const GOODBYE_MAX: Duration = Duration::from_millis(100);

/// Why a request was not answered with what was asked for.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection is gone: another one may do.
    Lost(io::Error),
    /// The server can't do it, and said so; the connection is as good as before.
    Refused(io::Error),
    /// What came was not an answer. The connection can't be used any more, and another would hardly do better.
    Nonsense(&'static str),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Lost(named(error))
    }
}

/// An error of a connection, as an operator understands it.
fn named(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "it has closed the connection"),
        _ => error,
    }
}

/// A run of the export that has one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// Bytes.
    pub(super) len: u64,
    /// Whether all of it reads as zeroes.
    pub(super) is_zero: bool,
}

/// An export that can be read.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<Stream>,
    terms: Terms,
    cookie: u64,
}

/// What a part of a reply begins with.
enum Head {
    Simple { error: u32 },
    Chunk { is_last: bool, kind: u16, len: u32 },
}

impl Connection {
    /// Connects and agrees with the server on how to go on, until `deadline` at most. Once `hurry` is set, nothing is
    /// waited for any more. What `silence_max` is for: [`Stream::connect`].
    pub(super) fn open(
        uri: &NbdUri,
        deadline: Instant,
        silence_max: Duration,
        hurry: &Hurry,
    ) -> io::Result<Self> {
        Self::negotiated(uri, deadline, silence_max, hurry).map_err(named)
    }

    fn negotiated(uri: &NbdUri, deadline: Instant, silence_max: Duration, hurry: &Hurry) -> io::Result<Self> {
        let mut stream = Stream::connect(&uri.server, deadline, silence_max, hurry)?;
        greet(&mut stream)?;
        if let Some(tls) = &uri.tls {
            start_tls(&mut stream)?;
            stream = stream.encrypted(tls)?;
        }
        let terms = negotiate(&mut stream, &uri.export)?;
        Ok(Self { stream: BufReader::new(stream), terms, cookie: 0 })
    }

    /// What was agreed on.
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// From now on nothing is waited for past `deadline`.
    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.stream.get_mut().set_deadline(deadline);
    }

    /// Fills `buf` from `offset` on; both are multiples of `block_min`, and `buf` is at most `payload_max` long.
    pub(super) fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
        let len = buf.len() as u32;
        self.send(Request::Read, offset, len)?;
        let mut covered = Covered::default();
        let mut error = None;
        loop {
            match self.head()? {
                Head::Simple { error: 0 } if !self.terms.structured => {
                    self.stream.read_exact(buf)?;
                    return Ok(());
                }
                Head::Simple { error } => return Err(refused(error, "")),
                Head::Chunk { is_last, kind, len: chunk_len } => {
                    match kind {
                        REPLY_OFFSET_DATA => {
                            let at = self.field(chunk_len, 8)?;
                            let part = covered.part(buf, offset, at, u64::from(chunk_len) - 8)?;
                            self.stream.read_exact(part)?;
                        }
                        REPLY_OFFSET_HOLE => {
                            let at = self.field(chunk_len, 12)?;
                            let hole = u32::from_be_bytes(self.bytes()?);
                            covered.part(buf, offset, at, hole.into())?.fill(0);
                        }
                        kind => self.other_chunk(kind, chunk_len, &mut error)?,
                    }
                    if is_last {
                        return match error {
                            Some(error) => Err(error),
                            None if covered.is_all_of(len) => Ok(()),
                            None => Err(Failure::Nonsense("its answer has less than what was asked for")),
                        };
                    }
                }
            }
        }
    }

    /// What `len` bytes from `offset` on are, or fewer of them, or more. Only of servers that tell holes.
    pub(super) fn status(&mut self, offset: u64, len: u32) -> Result<Vec<Status>, Failure> {
        self.send(Request::BlockStatus, offset, len)?;
        let (mut found, mut error) = (None, None);
        loop {
            match self.head()? {
                Head::Simple { error } => return Err(refused(error, "")),
                Head::Chunk { is_last, kind, len: chunk_len } => {
                    match kind {
                        REPLY_BLOCK_STATUS if found.is_none() => found = Some(self.descriptors(chunk_len)?),
                        REPLY_BLOCK_STATUS => return Err(Failure::Nonsense("it answers twice")),
                        kind => self.other_chunk(kind, chunk_len, &mut error)?,
                    }
                    if is_last {
                        let none = Failure::Nonsense("its answer says nothing of holes");
                        return error.map_or_else(|| found.ok_or(none), Err);
                    }
                }
            }
        }
    }

    fn descriptors(&mut self, len: u32) -> Result<Vec<Status>, Failure> {
        if !(12..=STATUS_LEN_MAX).contains(&len) || !(len - 4).is_multiple_of(8) {
            return Err(Failure::Nonsense("what it says of holes has no possible length"));
        }
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes)?;
        let mut fields = Fields(&bytes);
        if fields.u32() != self.terms.allocation {
            return Err(Failure::Nonsense("it says something else than what is a hole"));
        }
        let mut found = Vec::with_capacity(len as usize / 8);
        while let (Some(len), Some(flags)) = (fields.u32(), fields.u32()) {
            if len == 0 {
                return Err(Failure::Nonsense("it tells of a run of no length"));
            }
            found.push(Status { len: len.into(), is_zero: flags & STATE_ZERO != 0 });
        }
        Ok(found)
    }

    /// Tells the server that nothing more will be asked.
    pub(super) fn close(mut self) {
        self.set_deadline(Instant::now() + GOODBYE_MAX);
        // If it does not hear that, it sees the end of the connection.
        let _ = self.send(Request::Disconnect, 0, 0);
    }

    fn send(&mut self, what: Request, offset: u64, len: u32) -> io::Result<()> {
        self.cookie += 1;
        self.stream.get_mut().write_all(&request(what, self.cookie, offset, len))
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The offset that a chunk of `len` bytes, at least `least`, begins with.
    fn field(&mut self, len: u32, least: u32) -> Result<u64, Failure> {
        if len < least {
            return Err(Failure::Nonsense("a part of its answer is too short"));
        }
        Ok(u64::from_be_bytes(self.bytes()?))
    }

    fn head(&mut self) -> Result<Head, Failure> {
        let magic = u32::from_be_bytes(self.bytes()?);
        let (head, cookie) = match magic {
            SIMPLE_REPLY_MAGIC => {
                let error = u32::from_be_bytes(self.bytes()?);
                (Head::Simple { error }, u64::from_be_bytes(self.bytes()?))
            }
            STRUCTURED_REPLY_MAGIC if self.terms.structured => {
                let flags = u16::from_be_bytes(self.bytes()?);
                let kind = u16::from_be_bytes(self.bytes()?);
                let cookie = u64::from_be_bytes(self.bytes()?);
                let len = u32::from_be_bytes(self.bytes()?);
                (Head::Chunk { is_last: flags & REPLY_DONE != 0, kind, len }, cookie)
            }
            _ => return Err(Failure::Nonsense("what it answers is not the NBD protocol")),
        };
        if cookie != self.cookie {
            return Err(Failure::Nonsense("it answers what was not asked"));
        }
        Ok(head)
    }

    /// A chunk that carries no answer: nothing, or an error, the first of which counts.
    fn other_chunk(&mut self, kind: u16, len: u32, error: &mut Option<Failure>) -> Result<(), Failure> {
        if kind == REPLY_NONE && len == 0 {
            return Ok(());
        }
        if kind < REPLY_ERRORS || !(6..=ERROR_LEN_MAX).contains(&len) {
            return Err(Failure::Nonsense("its answer has a part that was not asked for"));
        }
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes)?;
        let mut fields = Fields(&bytes);
        let number = fields.u32().unwrap_or_default();
        let said_len = fields.u16().unwrap_or_default();
        let said = fields.rest().get(..said_len.into()).unwrap_or_default();
        error.get_or_insert(refused(number, &String::from_utf8_lossy(said)));
        Ok(())
    }
}

/// What a server says that it can't do, and why. Numbers are those of Linux ("Error values").
fn refused(number: u32, said: &str) -> Failure {
    let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
    let said = if said.is_empty() { said } else { format!(": \"{said}\"") };
    let error = io::Error::from_raw_os_error(number as i32);
    match number {
        0 => Failure::Nonsense("it answers that all is well, and nothing else"),
        ERROR_SHUTDOWN => Failure::Lost(io::Error::other("it is shutting down")),
        _ => Failure::Refused(io::Error::new(error.kind(), format!("the server failed: {error}{said}"))),
    }
}

/// Which parts of a buffer have been filled.
#[derive(Debug, Default)]
struct Covered {
    parts: Vec<(u64, u64)>,
    bytes: u64,
}

impl Covered {
    /// The part of `buf`, which is of `offset`, that is `len` bytes at `at`; each only once.
    fn part<'a>(
        &mut self,
        buf: &'a mut [u8],
        offset: u64,
        at: u64,
        len: u64,
    ) -> Result<&'a mut [u8], Failure> {
        let outside = Failure::Nonsense("its answer has more than what was asked for");
        let Some(begin) = at.checked_sub(offset) else { return Err(outside) };
        let Some(end) = begin.checked_add(len).filter(|end| *end <= buf.len() as u64) else {
            return Err(outside);
        };
        let is_twice = |(from, to): &(u64, u64)| begin < *to && *from < end;
        if len == 0 || self.parts.len() >= PARTS_MAX || self.parts.iter().any(is_twice) {
            return Err(Failure::Nonsense("its answer has a part twice, one of no length, or too many"));
        }
        self.parts.push((begin, end));
        self.bytes += len;
        buf.get_mut(begin as usize..end as usize).ok_or(outside)
    }

    /// As no part was there twice, it is enough to count.
    fn is_all_of(&self, len: u32) -> bool {
        self.bytes == u64::from(len)
    }
}

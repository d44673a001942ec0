//! Bases that are exports of NBD servers, such as `qemu-nbd` and `nbdkit`.
//!
//! A client of our own, as small as reading needs it. Of the libraries that there were in November 2026, `libnbd` has
//! no Rust bindings on crates.io; the crate `nbd` only asks with `NBD_OPT_EXPORT_NAME`, so it hears of no reason for a
//! refusal, of no block sizes and of no holes, and it can write; the others are servers or drive the kernel's client. Nobody of
//! them waits for a server that is away.
//!
//! What is used of the protocol (`doc/proto.md` of the NBD project) is the fixed newstyle negotiation with
//! `NBD_OPT_GO`, `NBD_OPT_STRUCTURED_REPLY` and the context `base:allocation` where the server has them, `NBD_CMD_READ` and
//! `NBD_CMD_BLOCK_STATUS`. There is no code that could ask for a change.
//!
//! TLS is that of `rustls` (`NBD_OPT_STARTTLS`, "Client-side requirements"): with X.509 certificates, always with a proof of who
//! the server is, and never given up for a connection without.
//!
//! Each connection is asked one thing at a time; where the server permits that (`NBD_FLAG_CAN_MULTI_CONN`) there are
//! several. A connection that fails is replaced, and what was asked over it is asked again, until a read has
//! waited for as long as it may.

mod connection;
mod handshake;
mod holes;
mod hurry;
mod outage;
mod stream;
mod tls;
mod uri;
mod wire;

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::connection::{Connection, Failure};
use self::holes::Holes;
use self::hurry::Hurry;
use self::outage::{Line, Step};

pub use self::hurry::{is_ending, stop_waiting_for_servers};
pub use self::uri::NbdUri;

/// How long an attempt to connect may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// The same where there are other connections that work: some servers limit how many they take.
const CONNECT_MORE_MAX: Duration = Duration::from_millis(500);
/// A connection that was idle for longer is replaced: it may have been forgotten on the way, unheard.
const IDLE_MAX: Duration = Duration::from_secs(20);
/// How often a wait looks whether it is to end early.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Bytes that are read at once.
const READ_MAX: u32 = 1 << 20;
/// Bytes of which the server is asked at once what is a hole.
const ASKED_MAX: u64 = 256 << 20;

/// An export, read-only.
#[derive(Debug)]
pub(crate) struct Nbd {
    uri: NbdUri,
    /// Its size in bytes; a server that has another one under this name is not read.
    size: u64,
    patience: Duration,
    pool: Mutex<Pool>,
    changed: Condvar,
    holes: Mutex<Holes>,
    /// Set: nothing is waited for any more.
    hurry: Hurry,
}

#[derive(Debug)]
struct Pool {
    line: Line,
    /// Connections that nobody uses, and since when.
    idle: Vec<(Connection, Instant)>,
}

impl Nbd {
    /// The export that `uri` names; reads wait for its server for `patience` at most. If its `size` is known, the server may be
    /// away.
    ///
    /// # Errors
    /// If the export can't be had, or has another size.
    pub(crate) fn open(uri: NbdUri, size: Option<u64>, patience: Duration) -> io::Result<Self> {
        let now = Instant::now();
        let mut pool = Pool { line: Line::new(patience), idle: Vec::new() };
        let hurry = Hurry::default();
        let connection =
            Connection::open(&uri, now + CONNECT_MAX.min(patience), silence_max(patience), &hurry);
        let size = match (connection, size) {
            (Ok(connection), size) => {
                // Said once, when a base is chosen.
                if size.is_none() && !connection.terms().read_only {
                    log::warn!("{uri}: the export is not read-only, so others may be able to write to it");
                }
                let size = size.unwrap_or(connection.terms().size);
                check_size(&connection, size)?;
                if connection.terms().allocation.is_none() {
                    log::info!("{uri}: the server tells no holes, all of it is copied");
                }
                pool.line.connected(connection.terms().multi_conn);
                pool.idle.push((connection, now));
                size
            }
            (Err(error), Some(size)) => {
                log::warn!("{uri}: its server can't be reached, what needs it waits: {error}");
                pool.line.lost(0, now, Instant::now(), error.to_string());
                size
            }
            (Err(error), None) => return Err(error),
        };
        let (changed, holes) = (Condvar::new(), Mutex::default());
        Ok(Self { uri, size, patience, pool: Mutex::new(pool), changed, holes, hurry })
    }

    /// Which export.
    pub(crate) fn uri(&self) -> &NbdUri {
        &self.uri
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Why the server does not answer, if the last that is known is that it does not.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.pool().line.trouble().map(str::to_owned)
    }

    /// As long as that is set, reads that would have to wait for the server fail instead.
    pub(crate) fn set_hurry(&self, hurry: bool) {
        self.hurry.set(hurry);
        // Under the lock, so that nobody begins to wait without having seen it.
        drop(self.pool());
        self.changed.notify_all();
    }

    /// Fills `buf` from `offset` on; all of it lies inside the export.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let len = self.request(|connection| read_some(connection, buf, offset))?;
            let (_, rest) = buf.split_at_mut(len);
            (buf, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    /// How many bytes from `offset` on are zeroes by the server's word, and how many after them are not; both together `len`
    /// at most. Without any of the latter it is zeroes up to there, or to the end of the export.
    pub(crate) fn content(&self, offset: u64, len: u64) -> io::Result<(u64, u64)> {
        let len = len.min(self.size.saturating_sub(offset));
        let mut zeroes = 0;
        while zeroes < len {
            let (at, left) = (offset + zeroes, len - zeroes);
            let known = self.holes().content(at, left);
            let (more, data) = known.map_or_else(|| self.ask_content(at, left), Ok)?;
            zeroes += more;
            if data > 0 {
                return Ok((zeroes, data));
            }
        }
        Ok((zeroes, 0))
    }

    /// The same of the server, which may say less; at least 1 byte.
    fn ask_content(&self, offset: u64, len: u64) -> io::Result<(u64, u64)> {
        let found = self.request(|connection| {
            let terms = connection.terms();
            if terms.allocation.is_none() {
                return Ok(None);
            }
            let begin = offset - offset % u64::from(terms.block_min);
            let asked = (self.size - begin).min(ASKED_MAX);
            match connection.status(begin, asked as u32) {
                Ok(statuses) => Ok(Some(Holes::new(begin, self.size, &statuses))),
                // It is only read for nothing then.
                Err(Failure::Refused(error)) => {
                    log::debug!("{}: what is a hole at byte {begin}: {error}", self.uri);
                    Ok(None)
                }
                Err(failure) => Err(failure),
            }
        })?;
        let Some(found) = found else { return Ok((0, len)) };
        let said = found.content(offset, len);
        *self.holes() = found;
        said.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the server says nothing of what was asked")
        })
    }

    fn holes(&self) -> MutexGuard<'_, Holes> {
        self.holes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for something over a connection, and again over others as long as they fail.
    fn request<T>(&self, mut ask: impl FnMut(&mut Connection) -> Result<T, Failure>) -> io::Result<T> {
        let began = Instant::now();
        loop {
            let mut connection = self.take(began)?;
            let asked = Instant::now();
            connection.set_deadline(began + self.patience);
            match ask(&mut connection) {
                Ok(answer) => {
                    self.put_back(connection);
                    return Ok(answer);
                }
                Err(Failure::Refused(error)) => {
                    self.put_back(connection);
                    return Err(error);
                }
                Err(Failure::Lost(error)) => self.lost(asked, error.to_string()),
                Err(Failure::Nonsense(what)) => {
                    self.lost(asked, what.to_owned());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", self.uri)));
                }
            }
        }
    }

    /// A connection, for a read that began at `began`.
    fn take(&self, began: Instant) -> io::Result<Connection> {
        let mut pool = self.pool();
        loop {
            let (idle, now) = (pool.idle.len(), Instant::now());
            if self.hurry.is_set() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the server is not waited for"));
            }
            match pool.line.step(idle, began, now) {
                Step::Take => {
                    let Some((connection, since)) = pool.idle.pop() else { continue };
                    if since.elapsed() < IDLE_MAX {
                        return Ok(connection);
                    }
                    pool.line.closed();
                }
                Step::Connect => {
                    let has_others = pool.line.has_others();
                    drop(pool);
                    if let Some(connection) = self.connect(began, has_others) {
                        return Ok(connection);
                    }
                    pool = self.pool();
                }
                Step::Wait(until) => {
                    let left = until.saturating_duration_since(now).min(LOOK_EVERY);
                    pool = self.changed.wait_timeout(pool, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                Step::GiveUp(why) => {
                    let (uri, patience) = (&self.uri, self.patience.as_secs_f32());
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("the server of {uri} has not answered for {patience} s: {why}"),
                    ));
                }
            }
        }
    }

    /// Makes a connection; if that fails, the line knows why.
    fn connect(&self, began: Instant, has_others: bool) -> Option<Connection> {
        let now = Instant::now();
        let limit = if has_others { CONNECT_MORE_MAX } else { CONNECT_MAX };
        let deadline = (began + self.patience).min(now + limit);
        let made = Connection::open(&self.uri, deadline, silence_max(self.patience), &self.hurry)
            .and_then(|connection| check_size(&connection, self.size).map(|()| connection));
        match made {
            Ok(connection) => return Some(connection),
            Err(error) if has_others => {
                log::debug!("{}: no other connection: {error}", self.uri);
                self.pool().line.refused();
                self.changed.notify_all();
            }
            Err(error) => self.lost(now, error.to_string()),
        }
        None
    }

    /// A connection failed that was asked for something at `since`. What others have been idle are likely to be gone as well.
    fn lost(&self, since: Instant, why: String) {
        let mut pool = self.pool();
        let idle = std::mem::take(&mut pool.idle);
        let begins = pool.line.lost(idle.len(), since, Instant::now(), why.clone());
        drop(pool);
        drop(idle);
        self.changed.notify_all();
        // What is exported when it is back is only supposed to be the same.
        *self.holes() = Holes::default();
        // Who waits for nothing has closed it itself.
        if begins && !self.hurry.is_set() {
            log::warn!(
                "{}: connection lost, reads wait for {} s: {why}",
                self.uri,
                self.patience.as_secs_f32()
            );
        }
    }

    /// After a request that was answered.
    fn put_back(&self, connection: Connection) {
        let now = Instant::now();
        let mut pool = self.pool();
        let outage = pool.line.answered(connection.terms().multi_conn, now);
        pool.idle.push((connection, now));
        drop(pool);
        self.changed.notify_all();
        if let Some(outage) = outage {
            log::warn!("{}: connected again after {:.1} s", self.uri, outage.as_secs_f32());
        }
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let idle = std::mem::take(&mut self.pool().idle);
        idle.into_iter().for_each(|(connection, _)| connection.close());
    }
}

/// How long a way may be silent before another connection is tried: a third of how long a read waits, so that what was asked can be
/// asked again twice.
fn silence_max(patience: Duration) -> Duration {
    patience / 3
}

/// What has another size is another disk, whatever its name.
fn check_size(connection: &Connection, size: u64) -> io::Result<()> {
    let found = connection.terms().size;
    if found == size {
        return Ok(());
    }
    let what = format!("the export has {found} bytes, expected {size}: it is not the base, or was resized");
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// Reads as much of `buf` as can be read at once; how much that is.
fn read_some(connection: &mut Connection, buf: &mut [u8], offset: u64) -> Result<usize, Failure> {
    let (min, max) = (u64::from(connection.terms().block_min), connection.terms().payload_max.min(READ_MAX));
    let len = buf.len().min(max as usize) as u64;
    if offset.is_multiple_of(min) && len.is_multiple_of(min) {
        let part = buf.get_mut(..len as usize).unwrap_or_default();
        connection.read(part, offset)?;
        return Ok(len as usize);
    }
    // More than what is wanted, because the server can't read less.
    let begin = offset - offset % min;
    let end = (offset + len).next_multiple_of(min).min(begin + u64::from(max));
    let mut whole = vec![0; (end - begin) as usize];
    connection.read(&mut whole, begin)?;
    let skip = (offset - begin) as usize;
    let part = whole.get(skip..).unwrap_or_default();
    let len = part.len().min(len as usize);
    buf.iter_mut().zip(part.iter().take(len)).for_each(|(to, from)| *to = *from);
    Ok(len)
}

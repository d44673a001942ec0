//! An NBD server that does what a test tells it to.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use base_image::NbdUri;

/// How the server answers a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// With what was asked for, in two parts and in the wrong order where replies are structured, zeroes as a hole.
    Right,
    /// With an error in the middle of the data.
    Error,
    /// With an error, and no structure.
    SimpleError,
    /// Without a part of it, as if all were said.
    Short,
    /// With one part twice, and one not at all.
    Twice,
    /// With more than was asked for.
    Beyond,
    /// To another question.
    OtherCookie,
    /// With a part of no known kind.
    OtherKind,
    /// That all is well, and nothing else.
    Empty,
    /// With what is no reply.
    Garbage,
    /// With some of it, and then goes.
    Breaks,
    /// Not.
    Stalls,
    /// A byte now and then.
    Drips,
}

/// What a server offers, and how it behaves.
#[derive(Clone, Debug)]
pub(crate) struct Manners {
    pub(crate) content: Arc<Vec<u8>>,
    pub(crate) structured: bool,
    pub(crate) tells_holes: bool,
    /// A block that it calls a hole, whatever is in it.
    pub(crate) lies_at: Option<u64>,
    /// Blocks that it tells of at once.
    pub(crate) told_max: usize,
    pub(crate) multi_conn: bool,
    /// Smallest and largest read; none is said if the smallest is 0.
    pub(crate) block_sizes: (u32, u32),
    /// How the next read is answered; after that, rightly.
    pub(crate) once: Option<Answer>,
    /// How all others are.
    pub(crate) answer: Answer,
    /// Connections are taken and closed at once.
    pub(crate) is_away: bool,
    /// A bit that is wrong: its number among those of a connection that are not content.
    pub(crate) flipped: Option<usize>,
}

impl Manners {
    pub(crate) fn new(content: Vec<u8>) -> Self {
        Self {
            content: Arc::new(content),
            structured: true,
            tells_holes: true,
            lies_at: None,
            told_max: usize::MAX,
            multi_conn: true,
            block_sizes: (0, 0),
            once: None,
            answer: Answer::Right,
            is_away: false,
            flipped: None,
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    requests: Vec<(u16, u64, u32)>,
    connections: usize,
}

/// A running server. Goes with its owner.
#[derive(Debug)]
pub(crate) struct Server {
    dir: tempfile::TempDir,
    manners: Arc<Mutex<Manners>>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(manners: Manners) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (manners, seen) = (Arc::new(Mutex::new(manners)), Arc::<Mutex<Seen>>::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (of_thread, seen_by, stopped) = (Arc::clone(&manners), Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                seen_by.lock().unwrap().connections += 1;
                let mut session = Session {
                    stream: stream.unwrap(),
                    manners: Arc::clone(&of_thread),
                    seen: Arc::clone(&seen_by),
                    said: 0,
                };
                if !of_thread.lock().unwrap().is_away {
                    thread::spawn(move || {
                        let _ = session.serve();
                    });
                }
            }
        });
        Self { dir, manners, seen, stop, thread: Some(thread) }
    }

    pub(crate) fn uri(&self) -> NbdUri {
        format!("nbd+unix:///golden?socket={}", self.socket().display()).parse().unwrap()
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// Changes what it does from now on.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.manners.lock().unwrap());
    }

    /// Kind, offset and length of each request so far.
    pub(crate) fn requests(&self) -> Vec<(u16, u64, u32)> {
        self.seen.lock().unwrap().requests.clone()
    }

    /// Connections that were made so far.
    pub(crate) fn connections(&self) -> usize {
        self.seen.lock().unwrap().connections
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = UnixStream::connect(self.socket());
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Session {
    stream: UnixStream,
    manners: Arc<Mutex<Manners>>,
    seen: Arc<Mutex<Seen>>,
    /// Bytes that are not content.
    said: usize,
}

impl Session {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    fn say(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let mut bytes = parts.concat();
        let flipped = self.manners.lock().unwrap().flipped;
        let place = flipped.and_then(|bit| Some((bit.checked_sub(self.said * 8)?, bit % 8)));
        if let Some((at, bit)) = place
            && let Some(byte) = bytes.get_mut(at / 8)
        {
            *byte ^= 1 << bit;
        }
        self.said += bytes.len();
        self.stream.write_all(&bytes)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        let len = (data.len() as u32).to_be_bytes();
        self.say(&[&magic, &option.to_be_bytes(), &kind.to_be_bytes(), &len, data])
    }

    fn serve(&mut self) -> io::Result<()> {
        let manners = self.manners.lock().unwrap().clone();
        self.say(&[b"NBDMAGICIHAVEOPT", &[0, 3]])?;
        assert_eq!(self.u32()?, 3);
        loop {
            assert_eq!(&self.bytes::<8>()?, b"IHAVEOPT");
            let (option, len) = (self.u32()?, self.u32()?);
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data)?;
            match option {
                8 if manners.structured => self.reply(8, 1, &[])?,
                10 if manners.tells_holes => {
                    self.reply(10, 4, &[[0, 0, 0, 7].as_slice(), b"base:allocation"].concat())?;
                    self.reply(10, 1, &[])?;
                }
                7 if data[4..4 + 6] != *b"golden" => self.reply(7, (1 << 31) + 6, b"no such thing")?,
                7 => {
                    let flags = 3 | u16::from(manners.multi_conn) << 8;
                    let size = (manners.content.len() as u64).to_be_bytes();
                    self.reply(7, 3, &[[0, 0].as_slice(), &size, &flags.to_be_bytes()].concat())?;
                    let (min, max) = manners.block_sizes;
                    if min > 0 {
                        let sizes = [min, min, max].map(u32::to_be_bytes).concat();
                        self.reply(7, 3, &[[0, 3].as_slice(), &sizes].concat())?;
                    }
                    self.reply(7, 1, &[])?;
                    return self.transmit(manners.structured);
                }
                _ => self.reply(option, (1 << 31) + 1, &[])?,
            }
        }
    }

    fn transmit(&mut self, structured: bool) -> io::Result<()> {
        loop {
            assert_eq!(self.u32()?, 0x2560_9513);
            let head: [u8; 4] = self.bytes()?;
            let kind = u16::from_be_bytes([head[2], head[3]]);
            let (cookie, offset) = (self.bytes::<8>()?, u64::from_be_bytes(self.bytes()?));
            let len = self.u32()?;
            self.seen.lock().unwrap().requests.push((kind, offset, len));
            let (content, answer, told_max, lies_at) = {
                let mut manners = self.manners.lock().unwrap();
                let answer = if kind == 0 { manners.once.take() } else { None };
                (
                    Arc::clone(&manners.content),
                    answer.unwrap_or(manners.answer),
                    manners.told_max,
                    manners.lies_at,
                )
            };
            match kind {
                0 => self.answer_read(
                    answer,
                    structured,
                    cookie,
                    offset,
                    &content[offset as usize..][..len as usize],
                )?,
                7 => {
                    let mut data = vec![0, 0, 0, 7];
                    let blocks = content[offset as usize..][..len as usize].chunks(4096);
                    for (at, block) in (offset..).step_by(4096).zip(blocks).take(told_max) {
                        let is_hole = lies_at == Some(at) || block.iter().all(|byte| *byte == 0);
                        let state = if is_hole { 3_u32 } else { 0 };
                        data.extend((block.len() as u32).to_be_bytes());
                        data.extend(state.to_be_bytes());
                    }
                    self.chunk(true, 5, cookie, &data)?;
                }
                _ => return Ok(()),
            }
        }
    }

    fn chunk(&mut self, is_last: bool, kind: u16, cookie: [u8; 8], data: &[u8]) -> io::Result<()> {
        let len = (data.len() as u32).to_be_bytes();
        self.say(&[&[0x66, 0x8e, 0x33, 0xef, 0, is_last.into()], &kind.to_be_bytes(), &cookie, &len, data])
    }

    fn data(&mut self, is_last: bool, cookie: [u8; 8], offset: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.iter().all(|byte| *byte == 0) {
            let hole = [offset.to_be_bytes().as_slice(), &(bytes.len() as u32).to_be_bytes()].concat();
            return self.chunk(is_last, 2, cookie, &hole);
        }
        let len = (bytes.len() as u32 + 8).to_be_bytes();
        let head = [0x66, 0x8e, 0x33, 0xef, 0, is_last.into(), 0, 1];
        self.say(&[&head, &cookie, &len, &offset.to_be_bytes()])?;
        self.stream.write_all(bytes)
    }

    fn simple(&mut self, error: u32, cookie: [u8; 8], bytes: &[u8]) -> io::Result<()> {
        self.say(&[&0x6744_6698_u32.to_be_bytes(), &error.to_be_bytes(), &cookie, bytes])
    }

    fn answer_read(
        &mut self,
        answer: Answer,
        structured: bool,
        cookie: [u8; 8],
        offset: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let middle = offset + first.len() as u64;
        let other: [u8; 8] = (u64::from_be_bytes(cookie) + 1).to_be_bytes();
        let broken = || Err(io::ErrorKind::ConnectionReset.into());
        match (answer, structured) {
            (Answer::Right, true) => {
                self.data(false, cookie, middle, second)?;
                self.data(false, cookie, offset, first)?;
                self.chunk(true, 0, cookie, &[])
            }
            (Answer::Right, false) => self.simple(0, cookie, bytes),
            (Answer::Error, true) => {
                self.data(false, cookie, offset, first)?;
                self.chunk(true, 1 << 15 | 1, cookie, &[[0, 0, 0, 5, 0, 3].as_slice(), b"bad"].concat())
            }
            (Answer::Error | Answer::SimpleError, _) => self.simple(5, cookie, &[]),
            (Answer::Short, true) => self.data(true, cookie, middle, second),
            (Answer::Twice, true) => {
                self.data(false, cookie, offset, first)?;
                self.data(true, cookie, offset, first)
            }
            (Answer::Beyond, true) => self.data(true, cookie, middle, bytes),
            (Answer::OtherCookie, true) => self.data(true, other, offset, bytes),
            (Answer::OtherCookie, false) => self.simple(0, other, bytes),
            (Answer::OtherKind, true) => self.chunk(true, 77, cookie, bytes),
            (Answer::Empty, true) => self.chunk(true, 0, cookie, &[]),
            (Answer::Breaks, true) => {
                let len = (bytes.len() as u32 + 8).to_be_bytes();
                self.say(&[
                    &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1],
                    &cookie,
                    &len,
                    &offset.to_be_bytes(),
                    first,
                ])?;
                broken()
            }
            (Answer::Breaks, false) => {
                self.simple(0, cookie, first)?;
                broken()
            }
            (Answer::Stalls, _) => self.bytes::<1>().map(|_| ()),
            (Answer::Drips, _) => {
                for byte in 0x6744_6698_u32.to_be_bytes().iter().chain(&[0; 4]).chain(&cookie).chain(bytes) {
                    self.say(&[&[*byte]])?;
                    thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            }
            _ => self.say(&[b"HTTP/1.1 400 Bad Request\r\n\r\n"]),
        }
    }
}

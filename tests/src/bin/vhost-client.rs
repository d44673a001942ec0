//! A vhost-user client as a process: `vhost-client SOCKET`. Reads commands from its standard input,
//! answers each with one line: `ok ...` or `error ...`. When it ends, so does its session.
//!
//! ```text
//! connect [QUEUES]             ok CAPACITY
//! disconnect                   ok
//! property NAME                ok VALUE
//! write OFFSET LEN SEED        ok
//! read OFFSET LEN              ok SHA-256
//! compare OFFSET LEN FILE      ok same | ok different
//! discard OFFSET LEN           ok
//! zero OFFSET LEN              ok
//! flush                        ok
//! scatter COUNT SEED           ok                 one write of 4 KiB into each of COUNT blocks
//! attempt COUNT SEED           ok WRITTEN FAILED  the same, but a write may fail; those that do not are read back
//! storm SEED [OFFSET LEN]      ok storming        then writes, into that part, until it is killed
//! load FILE                    ok                 the disk's contents for the next model
//! model SEED OPERATIONS QUEUES DEPTH              ok SUMMARY
//! endure SEED QUEUES DEPTH     ok enduring        then writes and reads until the next command, which is one of:
//!   reopen                     ok SUMMARY         connects again after the backend's death, looks at everything, goes on
//!   enough                     ok SUMMARY         looks at everything
//! bench PATTERN DEPTH SECONDS [QUEUES [RATE]]     ok SCORE   see `Load` and `Score`
//! limit FILE LOOP CACHE PATTERN DEPTH SECONDS     ok SCORE   of the file itself; LOOP: sync, io_uring, map; CACHE: buffered, direct
//! limit-first FILE LOOP CACHE DEPTH COUNT SEED    ok SCORE   of writes into COUNT blocks of it, each once
//! passes DEPTH COUNT SEED      ok FIRST STEADY    writes a second into COUNT blocks, and then into the same
//! turns DEPTH COUNT SEED PARTS ok                 then, at each `turn`:
//! turn                         ok RATE            writes a second into the next of PARTS parts of the blocks, over and over
//! first DEPTH COUNT SEED       ok RATE            the first of these alone
//! warm                         ok                 reads all of the disk, in order
//! beside SEED                  ok SESSION REGION WRITE                    microseconds of reads beside first writes, and of these
//! touches SEED                 ok REGION BLOCK STEADY                       microseconds of a single write
//! ```

use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use pristine_tests::client::{
    Client, Done, Endure, Limit, Load, Loop, Pattern, Plan, Request, Shape, Turns, run_beside, run_first,
    run_load, run_model, run_passes, run_touches, run_warm,
};
use pristine_tests::random::{Random, contents, scattered};
use sha2::{Digest, Sha256};

const BLOCK: u64 = 4096;
const DEPTH: usize = 32;

struct Session {
    socket: PathBuf,
    client: Option<Client>,
    turns: Option<Turns>,
    loaded: Vec<u8>,
}

fn main() {
    let socket = std::env::args_os().nth(1).unwrap().into();
    let mut session = Session { socket, client: None, turns: None, loaded: Vec::new() };
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if sender.send(line.unwrap()).is_err() {
                return;
            }
        }
    });
    while let Ok(line) = lines.recv() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["endure", ..] => session.endure(&words, &lines),
            _ => session.obey(&words),
        };
        match answer {
            Ok(answer) => say(format!("ok {answer}").trim_end()),
            Err(error) => say(&format!("error {error}")),
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("\"{word}\" is not a number"))
}

fn float(word: &str) -> Result<f64, String> {
    word.parse().map_err(|_| format!("\"{word}\" is not a number"))
}

fn load(pattern: &str, depth: &str, seconds: &str) -> Result<Load, String> {
    Ok(Load {
        pattern: Pattern::named(pattern).ok_or("no such pattern")?,
        depth: number(depth)? as usize,
        queues: 1,
        time: Duration::from_secs_f64(float(seconds)?),
        rate: None,
    })
}

/// A loop on a file, with its cache (`buffered`) or past it (`direct`).
fn limit<'a>(file: &'a str, way: &str, cache: &str) -> Result<Limit<'a>, String> {
    let way = Loop::named(way).ok_or("no such loop")?;
    Ok(Limit { file: file.as_ref(), direct: cache == "direct", way })
}

impl Session {
    fn client(&mut self) -> Result<&mut Client, String> {
        self.client.as_mut().ok_or_else(|| "not connected".into())
    }

    fn obey(&mut self, words: &[&str]) -> Result<String, String> {
        let [command, args @ ..] = words else { return Err("no command".into()) };
        match (*command, args) {
            ("connect", _) => {
                let queues = args.first().map_or(Ok(1), |word| number(word))? as usize;
                let client = Client::connect(&self.socket, Shape { queues, ..Shape::default() })?;
                let capacity = client.capacity();
                self.client = Some(client);
                Ok(capacity.to_string())
            }
            ("disconnect", []) => {
                self.client = None;
                Ok(String::new())
            }
            ("property", [name]) => Ok(self.client()?.property(name).to_string()),
            ("write", [offset, len, seed]) => {
                let offset = number(offset)?;
                let data = contents(number(seed)?, offset, number(len)? as usize);
                self.client()?.write(0, offset, &data).map(|()| String::new())
            }
            ("read", [offset, len]) => {
                let data = self.client()?.read(0, number(offset)?, number(len)? as usize)?;
                Ok(Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect())
            }
            ("compare", [offset, len, file]) => self.compare(number(offset)?, number(len)? as usize, file),
            ("discard", [offset, len]) => {
                self.request(&Request::Discard { offset: number(offset)?, len: number(len)? })
            }
            ("zero", [offset, len]) => {
                let (offset, len) = (number(offset)?, number(len)?);
                self.request(&Request::Zero { offset, len, may_unmap: true })
            }
            ("flush", []) => self.request(&Request::Flush),
            ("scatter", [count, seed]) => {
                let (count, seed) = (number(count)?, number(seed)?);
                let blocks = scattered(seed, count, self.client()?.capacity() / BLOCK);
                self.write_blocks(seed, &mut blocks.into_iter(), || {}).map(|()| String::new())
            }
            ("attempt", [count, seed]) => self.attempt(number(count)?, number(seed)?),
            ("storm", [seed]) => {
                let disk = self.client()?.capacity();
                self.storm(number(seed)?, 0, disk)
            }
            ("storm", [seed, offset, len]) => self.storm(number(seed)?, number(offset)?, number(len)?),
            ("load", [file]) => {
                self.loaded = std::fs::read(file).map_err(|error| error.to_string())?;
                Ok(String::new())
            }
            ("model", [seed, operations, queues, depth]) => {
                let plan = Plan {
                    seed: number(seed)?,
                    operations: number(operations)?,
                    queues: number(queues)? as usize,
                    depth: number(depth)? as usize,
                };
                run_model(&self.socket, std::mem::take(&mut self.loaded), plan)
                    .map(|summary| format!("{summary:?}"))
            }
            ("bench", [pattern, depth, seconds, more @ ..]) => {
                let load = Load {
                    queues: more.first().map_or(Ok(1), |word| number(word))? as usize,
                    rate: more.get(1).map(|word| float(word)).transpose()?,
                    ..load(pattern, depth, seconds)?
                };
                run_load(&self.socket, load).map(|score| score.to_string())
            }
            ("limit", [file, way, cache, pattern, depth, seconds]) => {
                let load = load(pattern, depth, seconds)?;
                limit(file, way, cache)?.load(load).map(|score| score.to_string())
            }
            ("limit-first", [file, way, cache, depth, count, seed]) => limit(file, way, cache)?
                .first(number(depth)? as usize, number(count)?, number(seed)?)
                .map(|score| score.to_string()),
            ("passes", [depth, count, seed]) => {
                let depth = number(depth)? as usize;
                let [first, second] = run_passes(&self.socket, depth, number(count)?, number(seed)?)?;
                Ok(format!("{first:.0} {second:.0}"))
            }
            ("turns", [depth, count, seed, parts]) => {
                let (depth, parts) = (number(depth)? as usize, number(parts)? as usize);
                self.turns = Some(Turns::start(&self.socket, depth, number(count)?, number(seed)?, parts)?);
                Ok(String::new())
            }
            ("turn", []) => {
                let turns = self.turns.as_mut().ok_or("whose turns?")?;
                turns.turn().map(|rate| format!("{rate:.0}"))
            }
            ("first", [depth, count, seed]) => {
                run_first(&self.socket, number(depth)? as usize, number(count)?, number(seed)?)
                    .map(|rate| format!("{rate:.0}"))
            }
            ("warm", []) => run_warm(&self.socket).map(|()| String::new()),
            ("beside", [seed]) => {
                let times = run_beside(&self.socket, number(seed)?)?;
                Ok(format!("{:.2} {:.2} {:.2}", times.session, times.region, times.write))
            }
            ("touches", [seed]) => {
                let touches = run_touches(&self.socket, number(seed)?)?;
                Ok(format!("{:.2} {:.2} {:.2}", touches.region, touches.block, touches.steady))
            }
            _ => Err(format!("what is {words:?}?")),
        }
    }

    /// Works until it is told that it is enough; what it is told meanwhile comes from `lines`.
    fn endure(&mut self, words: &[&str], lines: &Receiver<String>) -> Result<String, String> {
        let [_, seed, queues, depth] = words else { return Err("endure SEED QUEUES DEPTH".into()) };
        let base = std::mem::take(&mut self.loaded);
        let (queues, depth) = (number(queues)? as usize, number(depth)? as usize);
        let mut endure = Endure::start(&self.socket, base, number(seed)?, queues, depth)?;
        say("ok enduring");
        loop {
            match lines.try_recv().as_deref() {
                Ok("reopen") => say(&format!("ok {:?}", endure.reopen()?)),
                Ok("enough") | Err(TryRecvError::Disconnected) => {
                    return endure.finish().map(|done| format!("{done:?}"));
                }
                Ok(other) => return Err(format!("what is {other}?")),
                Err(TryRecvError::Empty) => endure.work()?,
            }
        }
    }

    fn request(&mut self, request: &Request) -> Result<String, String> {
        self.client()?.perform(0, request).map(|()| String::new())
    }

    fn compare(&mut self, offset: u64, len: usize, file: &str) -> Result<String, String> {
        let read = self.client()?.read(0, offset, len)?;
        let mut expected = vec![0; len];
        let file = std::fs::File::open(file).map_err(|error| error.to_string())?;
        file.read_exact_at(&mut expected, offset).map_err(|error| error.to_string())?;
        Ok(if read == expected { "same" } else { "different" }.into())
    }

    /// Writes to `count` blocks, each once; then reads those whose writes succeeded.
    fn attempt(&mut self, count: u64, seed: u64) -> Result<String, String> {
        let client = self.client()?;
        let blocks = scattered(seed, count, client.capacity() / BLOCK);
        let (mut begun, mut written, mut failed) = (0, Vec::new(), 0);
        let mut of_slot = [0; DEPTH];
        let mut done: Vec<_> = (0..DEPTH).map(|slot| Done { slot, result: 1 }).collect();
        loop {
            for Done { slot, result } in done.drain(..) {
                match result {
                    0 => written.push(of_slot[slot]),
                    1 => {} // its first turn
                    _ => failed += 1,
                }
                if let Some(block) = blocks.get(begun) {
                    begun += 1;
                    of_slot[slot] = *block;
                    client.submit_contents(slot % client.queues(), slot, seed, block * BLOCK, BLOCK as usize);
                }
            }
            if written.len() + failed == blocks.len() {
                break;
            }
            client.wait_any(&mut done)?;
        }
        for block in &written {
            if client.read(0, block * BLOCK, BLOCK as usize)? != contents(seed, block * BLOCK, BLOCK as usize)
            {
                return Err(format!("block {block} does not hold what was written to it"));
            }
        }
        Ok(format!("{} {failed}", written.len()))
    }

    /// Writes until the process is killed. The answer comes as soon as writes have completed.
    fn storm(&mut self, seed: u64, offset: u64, len: u64) -> Result<String, String> {
        let (first, blocks) = (offset / BLOCK, len / BLOCK);
        let mut random = Random::new(seed);
        let mut told = false;
        let mut endless = std::iter::from_fn(|| Some(first + random.below(blocks)));
        self.write_blocks(seed, &mut endless, || {
            if !told {
                say("ok storming");
                told = true;
            }
        })?;
        Ok(String::new())
    }

    /// Writes the contents that `seed` has into `blocks`, many at a time over all queues.
    fn write_blocks(
        &mut self,
        seed: u64,
        blocks: &mut dyn Iterator<Item = u64>,
        mut completed: impl FnMut(),
    ) -> Result<(), String> {
        let client = self.client()?;
        let queues = client.queues();
        let mut free: Vec<usize> = (0..DEPTH).collect();
        let mut done = Vec::new();
        loop {
            while let Some(slot) = free.pop() {
                let Some(block) = blocks.next() else {
                    free.push(slot);
                    break;
                };
                client.submit_contents(slot % queues, slot, seed, block * BLOCK, BLOCK as usize);
            }
            if free.len() == DEPTH {
                return Ok(());
            }
            client.wait_any(&mut done)?;
            for done in done.drain(..) {
                if done.result != 0 {
                    return Err(format!("a write failed: error {}", -done.result));
                }
                free.push(done.slot);
            }
            completed();
        }
    }
}

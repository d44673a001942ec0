//! What is agreed on with a server before anything is read (`doc/proto.md`, "Fixed newstyle negotiation",
//! "Option types").

use std::io::{self, Read, Write};

use super::wire::{
    BASE_ALLOCATION, FLAG_CAN_MULTI_CONN, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, FLAG_READ_ONLY, Fields,
    GREETING, INFO_BLOCK_SIZE, INFO_EXPORT, OPTION_REPLY_MAGIC, Opt, REP_ACK, REP_ERR_POLICY,
    REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERRORS, REP_INFO, REP_META_CONTEXT, go, option, set_meta_context,
};

/// The data of an option's reply is no longer.
const REPLY_LEN_MAX: u32 = 64 << 10;
/// Replies to one option.
const REPLIES_MAX: usize = 64;
/// The largest smallest read that is put up with, in bytes.
const BLOCK_MIN_MAX: u32 = 64 << 10;
/// What every server must be able to send at once ("Size constraints"), in bytes.
const PAYLOAD_MAX: u32 = 32 << 20;

/// What a server has agreed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// Size of the export in bytes.
    pub(super) size: u64,
    /// Whether nobody can write to it through this server.
    pub(super) read_only: bool,
    /// Whether it may be read over several connections.
    pub(super) multi_conn: bool,
    /// Whether replies are structured.
    pub(super) structured: bool,
    /// The number of the context that tells holes, if it does.
    pub(super) allocation: Option<u32>,
    /// What offsets and lengths of reads must be multiples of, in bytes; a power of two.
    pub(super) block_min: u32,
    /// The most that can be read at once, in bytes; a multiple of `block_min`.
    pub(super) payload_max: u32,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Takes the server's greeting and answers it.
pub(super) fn greet(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let flags = greeting.strip_prefix(GREETING).and_then(|rest| Fields(rest).u16());
    let Some(flags) = flags.filter(|flags| flags & FLAG_FIXED_NEWSTYLE != 0) else {
        return Err(wrong("it is no NBD server that speaks the fixed newstyle protocol"));
    };
    let answer = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    stream.write_all(&u32::from(answer).to_be_bytes())
}

/// Asks for TLS; from then on the bytes are those of a TLS session.
pub(super) fn start_tls(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let reply = ask(stream, Opt::StartTls, &[])?;
    if reply.kind == REP_ACK { Ok(()) } else { Err(refusal("TLS", &reply)) }
}

/// Agrees on how `export` is to be read. If there is no such export, or it can't be read, that is the error.
pub(super) fn negotiate(stream: &mut (impl Read + Write), export: &str) -> io::Result<Terms> {
    let structured = ask(stream, Opt::StructuredReply, &[])?;
    if structured.kind == REP_ERR_TLS_REQD {
        return Err(refusal("a connection without TLS", &structured));
    }
    let structured = structured.kind == REP_ACK;
    let allocation = if structured { find_allocation(stream, export)? } else { None };
    let mut terms = Terms {
        size: 0,
        read_only: false,
        multi_conn: false,
        structured,
        allocation,
        block_min: 1,
        payload_max: PAYLOAD_MAX,
    };
    let mut is_known = false;
    stream.write_all(&option(Opt::Go, &go(export)))?;
    for _ in 0..REPLIES_MAX {
        let reply = read_reply(stream, Opt::Go)?;
        match reply.kind {
            REP_ACK if is_known => return check(terms),
            REP_ACK => return Err(wrong("it does not say how large the export is")),
            REP_INFO => {
                is_known |=
                    learn(&mut terms, &reply.data).ok_or_else(|| wrong("its information is cut off"))?
            }
            _ => return Err(refusal(&format!("the export \"{export}\""), &reply)),
        }
    }
    Err(wrong("it has too much to say of the export"))
}

/// The number of the context that tells holes; without one all is data.
fn find_allocation(stream: &mut (impl Read + Write), export: &str) -> io::Result<Option<u32>> {
    stream.write_all(&option(Opt::SetMetaContext, &set_meta_context(export, BASE_ALLOCATION)))?;
    let mut found = None;
    for _ in 0..REPLIES_MAX {
        let reply = read_reply(stream, Opt::SetMetaContext)?;
        match reply.kind {
            REP_ACK => return Ok(found),
            REP_META_CONTEXT => {
                let mut fields = Fields(&reply.data);
                let number = fields.u32().ok_or_else(|| wrong("its metadata context is cut off"))?;
                if fields.rest() == BASE_ALLOCATION.as_bytes() {
                    found = Some(number);
                }
            }
            _ if reply.kind >= REP_ERRORS => return Ok(None),
            _ => {}
        }
    }
    Err(wrong("it has too many metadata contexts"))
}

/// Takes a piece of information; whether it was the one that counts, `None` if it is cut off.
fn learn(terms: &mut Terms, data: &[u8]) -> Option<bool> {
    let mut fields = Fields(data);
    match fields.u16()? {
        INFO_EXPORT => {
            terms.size = fields.u64()?;
            let flags = fields.u16()?;
            terms.read_only = flags & FLAG_READ_ONLY != 0;
            terms.multi_conn = flags & FLAG_CAN_MULTI_CONN != 0;
            Some(true)
        }
        INFO_BLOCK_SIZE => {
            terms.block_min = fields.u32()?;
            let _preferred = fields.u32()?;
            terms.payload_max = fields.u32()?.min(PAYLOAD_MAX);
            Some(false)
        }
        _ => Some(false),
    }
}

fn check(mut terms: Terms) -> io::Result<Terms> {
    let min = terms.block_min;
    if !min.is_power_of_two() || min > BLOCK_MIN_MAX || terms.payload_max < min {
        return Err(wrong(format!(
            "reads of at least {min} bytes and at most {} are no use",
            terms.payload_max
        )));
    }
    if !terms.size.is_multiple_of(min.into()) {
        return Err(wrong(format!(
            "the export's {} bytes are not a multiple of the {min} that can be read",
            terms.size
        )));
    }
    terms.payload_max -= terms.payload_max % min;
    Ok(terms)
}

/// An option that is answered once.
fn ask(stream: &mut (impl Read + Write), asked: Opt, data: &[u8]) -> io::Result<Reply> {
    stream.write_all(&option(asked, data))?;
    read_reply(stream, asked)
}

fn read_reply(stream: &mut impl Read, asked: Opt) -> io::Result<Reply> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let mut fields = Fields(&head);
    let magic = fields.u64();
    let (Some(option), Some(kind), Some(len)) = (fields.u32(), fields.u32(), fields.u32()) else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    if magic != Some(OPTION_REPLY_MAGIC) || option != asked as u32 || len > REPLY_LEN_MAX {
        return Err(wrong("what it says in the handshake is not the NBD protocol"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok(Reply { kind, data })
}

/// That something is not to be had, with the server's own words.
fn refusal(what: &str, reply: &Reply) -> io::Error {
    let (kind, why) = match reply.kind {
        REP_ERR_UNKNOWN => (io::ErrorKind::NotFound, "it does not have".to_owned()),
        REP_ERR_POLICY => (io::ErrorKind::PermissionDenied, "it does not permit".to_owned()),
        REP_ERR_TLS_REQD => (io::ErrorKind::PermissionDenied, "write nbds:// for TLS: it refuses".to_owned()),
        kind => (io::ErrorKind::Unsupported, format!("(error {}) it refuses", kind & !REP_ERRORS)),
    };
    let said = String::from_utf8_lossy(&reply.data);
    let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
    let said = if said.is_empty() { said } else { format!(": \"{said}\"") };
    io::Error::new(kind, format!("{why} {what}{said}"))
}

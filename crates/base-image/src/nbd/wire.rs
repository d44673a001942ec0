//! Messages of the NBD protocol, as bytes. Names and numbers are those of `doc/proto.md`, "Values".
//!
//! There is no request that changes anything, so none can be sent.

/// The server's greeting ("Newstyle negotiation").
pub(super) const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
/// What each option of the client begins with.
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, and the client's answer to them: fixed newstyle, and no padding after the handshake.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 2;

/// Transmission flags.
pub(super) const FLAG_READ_ONLY: u16 = 1 << 1;
pub(super) const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// What is negotiated ("Option types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opt {
    StartTls = 5,
    Go = 7,
    StructuredReply = 8,
    SetMetaContext = 10,
}

/// Option reply types.
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
/// All replies from here on are errors.
pub(super) const REP_ERRORS: u32 = 1 << 31;
pub(super) const REP_ERR_POLICY: u32 = REP_ERRORS + 2;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERRORS + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERRORS + 6;

/// Kinds of information on an export.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// The metadata context that tells holes.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";
/// Status flag: reads as zeroes.
pub(super) const STATE_ZERO: u32 = 1 << 1;

/// What is asked for ("Request types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read = 0,
    Disconnect = 2,
    BlockStatus = 7,
}

/// The flag of a reply's last chunk.
pub(super) const REPLY_DONE: u16 = 1;

/// Structured reply types.
pub(super) const REPLY_NONE: u16 = 0;
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_OFFSET_HOLE: u16 = 2;
pub(super) const REPLY_BLOCK_STATUS: u16 = 5;
/// All types from here on are errors.
pub(super) const REPLY_ERRORS: u16 = 1 << 15;
/// Longest message of an error that is read.
pub(super) const ERROR_LEN_MAX: u32 = 8192;

/// The server goes down, and may come back.
pub(super) const ERROR_SHUTDOWN: u32 = 108;

/// Fields of a message, one after the other.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_be_bytes)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// An option with its data.
pub(super) fn option(option: Opt, data: &[u8]) -> Vec<u8> {
    let head = [OPTION_MAGIC.as_slice(), &(option as u32).to_be_bytes(), &(data.len() as u32).to_be_bytes()];
    [head.concat().as_slice(), data].concat()
}

/// A string with its length before it.
fn string(text: &str) -> Vec<u8> {
    [(text.len() as u32).to_be_bytes().as_slice(), text.as_bytes()].concat()
}

/// The data of [`Opt::Go`]: the export, and that its block sizes are of interest.
pub(super) fn go(export: &str) -> Vec<u8> {
    [string(export), vec![0, 1], INFO_BLOCK_SIZE.to_be_bytes().to_vec()].concat()
}

/// The data of [`Opt::SetMetaContext`]: the export, and one context.
pub(super) fn set_meta_context(export: &str, context: &str) -> Vec<u8> {
    [string(export), 1_u32.to_be_bytes().to_vec(), string(context)].concat()
}

/// A request of the transmission phase.
pub(super) fn request(request: Request, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    let fields = REQUEST_MAGIC
        .to_be_bytes()
        .into_iter()
        .chain([0; 2])
        .chain((request as u16).to_be_bytes())
        .chain(cookie.to_be_bytes())
        .chain(offset.to_be_bytes())
        .chain(len.to_be_bytes());
    bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_laid_out_as_the_protocol_says() {
        assert_eq!(
            option(Opt::Go, &go("ab")),
            [b"IHAVEOPT".as_slice(), &[0, 0, 0, 7, 0, 0, 0, 10], &[0, 0, 0, 2, b'a', b'b', 0, 1, 0, 3]]
                .concat()
        );
        assert_eq!(
            set_meta_context("", "base:x"),
            [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 6, b'b', b'a', b's', b'e', b':', b'x']
        );
        let bytes = request(Request::BlockStatus, 3, 5, 9);
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 7]);
        assert_eq!((bytes[15], bytes[23], bytes[27]), (3, 5, 9));
        let mut fields = Fields(&bytes);
        assert_eq!(
            (fields.u32(), fields.u32(), fields.u64(), fields.u64()),
            (Some(REQUEST_MAGIC), Some(7), Some(3), Some(5))
        );
        assert_eq!((fields.u64(), fields.u16(), fields.rest().len()), (None, Some(0), 2));
    }
}

//! Lines from a client that may never send one.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest request in bytes, without its newline.
pub const REQUEST_BYTES_MAX: usize = 4096;

/// How long a client may be silent between requests.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a request may take from its first byte to its last.
const LINE_TIME_MAX: Duration = Duration::from_secs(10);

/// What a client has sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// One line, without its newline.
    Complete(Vec<u8>),
    /// The beginning of one; the client hung up.
    CutOff,
    /// More than a line can have; the rest is not read.
    TooLong,
    /// Nothing more: the client has hung up, or was too slow, or its connection is broken.
    End,
}

/// Reads lines of bounded length in bounded time.
#[derive(Debug, Default)]
pub(crate) struct LineReader {
    buffer: Vec<u8>,
}

impl LineReader {
    /// The next line.
    pub(crate) fn next(&mut self, mut stream: &UnixStream) -> Line {
        let mut deadline = Instant::now() + if self.buffer.is_empty() { SILENCE_MAX } else { LINE_TIME_MAX };
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.truncate(end);
                return if end > REQUEST_BYTES_MAX { Line::TooLong } else { Line::Complete(line) };
            }
            if self.buffer.len() > REQUEST_BYTES_MAX {
                return Line::TooLong;
            }
            // A timeout of zero would mean none.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
                return Line::End;
            }
            let mut chunk = [0; 1024];
            match stream.read(&mut chunk) {
                Ok(0) if self.buffer.is_empty() => return Line::End,
                Ok(0) => return Line::CutOff,
                Ok(len) => {
                    if self.buffer.is_empty() {
                        deadline = Instant::now() + LINE_TIME_MAX;
                    }
                    self.buffer.extend(chunk.iter().take(len));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Line::End,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn lines(bytes: &[u8]) -> Vec<Line> {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(bytes).unwrap();
        drop(client);
        let mut reader = LineReader::default();
        let mut lines = Vec::new();
        loop {
            let line = reader.next(&server);
            let more = matches!(line, Line::Complete(_));
            lines.push(line);
            if !more {
                return lines;
            }
        }
    }

    fn complete(text: &str) -> Line {
        Line::Complete(text.into())
    }

    #[test]
    fn lines_sent_at_once_are_read_one_by_one() {
        assert_eq!(lines(b"one\n\ntwo\n"), [complete("one"), complete(""), complete("two"), Line::End]);
        assert_eq!(lines(b"one\ntw"), [complete("one"), Line::CutOff]);
        assert_eq!(lines(b""), [Line::End]);
    }

    #[test]
    fn line_of_the_greatest_length_is_read_and_a_longer_one_is_not() {
        let longest = "x".repeat(REQUEST_BYTES_MAX);
        assert_eq!(lines(format!("{longest}\n").as_bytes()), [complete(&longest), Line::End]);
        assert_eq!(lines(format!("{longest}x\n").as_bytes()), [Line::TooLong]);
        assert_eq!(lines("x".repeat(REQUEST_BYTES_MAX * 10).as_bytes()), [Line::TooLong]);
    }
}

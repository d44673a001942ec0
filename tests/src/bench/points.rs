//! Names of measurements, such as `randread-32` and `seqread-16x2`.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use crate::client::Pattern;

/// A pattern, how many requests at a time, and on how many queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// What is asked of the backend.
    pub pattern: Pattern,
    /// Requests at a time on each queue.
    pub depth: usize,
    /// Queues.
    pub queues: usize,
}

impl Point {
    /// A point on one queue.
    pub const fn one_queue(pattern: Pattern, depth: usize) -> Self {
        Self { pattern, depth, queues: 1 }
    }
}

impl Display for Point {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pattern.name(), self.depth)?;
        if self.queues > 1 { write!(f, "x{}", self.queues) } else { Ok(()) }
    }
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (pattern, numbers) = text.split_once('-')?;
            let (depth, queues) = numbers.split_once('x').unwrap_or((numbers, "1"));
            Some(Self {
                pattern: Pattern::named(pattern)?,
                depth: depth.parse().ok().filter(|depth| (1..=128).contains(depth))?,
                queues: queues.parse().ok().filter(|queues| (1..=16).contains(queues))?,
            })
        };
        parsed().ok_or_else(|| {
            let patterns = Pattern::ALL.map(Pattern::name).join(", ");
            format!(
                "\"{text}\" is no point: PATTERN-DEPTH or PATTERN-DEPTHxQUEUES, such as randread-32 or \
                 seqread-16x2, with up to 128 requests and 16 queues; the patterns are {patterns}"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn point_that_is_written_and_read_is_the_same() {
        for text in ["randread-1", "mix-128", "seqwrite-16x2"] {
            assert_eq!(text.parse::<Point>().unwrap().to_string(), text);
        }
        for bad in ["randread", "nothing-1", "randread-0", "randread-129", "mix-1x0"] {
            assert!(bad.parse::<Point>().is_err(), "{bad}");
        }
    }
}

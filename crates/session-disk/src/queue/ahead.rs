//! Reading ahead for guests, where the kernel is told not to do it ([`File::keep_folios_small`]).
//!
//! What the kernel reads ahead comes into the page cache in folios that grow with each step, up to 2 MiB, and each small
//! write into one of them is dear ever after. What it is asked for comes in the smallest there are. So this looks
//! for reads that follow one another and asks for what comes next, in time. It sees the reads that have to wait
//! and, as long as it is ahead of a guest, those that need not.
//!
//! [`File::keep_folios_small`]: blockio::File::keep_folios_small

/// Sequences of reads that are followed at once, on one queue.
const STREAMS: usize = 4;
/// How far it reads ahead at first and at last, bytes.
const WINDOW_MIN: u64 = 16 << 10;
const WINDOW_FIRST_MAX: u64 = 128 << 10;
const WINDOW_MAX: u64 = 512 << 10;
/// After so many reads that were no part of any sequence none is followed any more.
const STRANGERS_MAX: u32 = 1024;

/// Bytes to be read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Reads that follow one another.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where the next one should begin.
    next: u64,
    /// End of what was asked for.
    end: u64,
    /// How much was asked for last; 0: only one read was seen.
    window: u64,
    /// When it was seen last; 0: never.
    used: u64,
}

/// The sequences of one queue.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    streams: [Stream; STREAMS],
    /// Whether any is followed.
    follows: bool,
    strangers: u32,
    clock: u64,
}

impl Stream {
    /// Whether a read at `offset` goes on with it. Those that are under way together may change places.
    fn goes_on_at(&self, offset: u64) -> bool {
        match self.window {
            0 => self.used > 0 && offset == self.next,
            window => offset.saturating_add(window) >= self.next && offset <= self.end,
        }
    }

    /// A read of `len` bytes at `offset` goes on with it: what to read ahead now.
    fn go_on(&mut self, offset: u64, len: u64) -> Option<Window> {
        self.next = self.next.max(offset.saturating_add(len));
        self.end = self.end.max(self.next);
        if self.end - self.next > self.window / 2 {
            return None;
        }
        self.window = match self.window {
            0 => len.saturating_mul(4).clamp(WINDOW_MIN, WINDOW_FIRST_MAX),
            window => (window * 2).min(WINDOW_MAX),
        };
        let window = Window { offset: self.end, len: self.window };
        self.end = self.end.saturating_add(self.window);
        Some(window)
    }
}

impl Ahead {
    /// Whether reads that need not wait are of interest.
    pub(super) fn follows(&self) -> bool {
        self.follows
    }

    /// A read has to wait: what to read ahead.
    pub(super) fn missed(&mut self, offset: u64, len: u64) -> Option<Window> {
        self.clock += 1;
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.goes_on_at(offset)) {
            stream.used = self.clock;
            (self.follows, self.strangers) = (true, 0);
            return stream.go_on(offset, len);
        }
        let end = offset.saturating_add(len);
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = Stream { next: end, end, window: 0, used: self.clock };
        }
        None
    }

    /// A read did not have to wait: what to read ahead.
    pub(super) fn hit(&mut self, offset: u64, len: u64) -> Option<Window> {
        let followed = |stream: &&mut Stream| stream.window > 0 && stream.goes_on_at(offset);
        match self.streams.iter_mut().find(followed) {
            Some(stream) => {
                self.clock += 1;
                stream.used = self.clock;
                self.strangers = 0;
                stream.go_on(offset, len)
            }
            None => {
                self.strangers += 1;
                if self.strangers >= STRANGERS_MAX {
                    *self = Self::default();
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    #[test]
    fn read_that_follows_nothing_has_nothing_read_ahead() {
        let mut ahead = Ahead::default();
        for at in [0, 100, 50, 7, 9_000] {
            assert_eq!(ahead.missed(at << 20, 4 * KIB), None);
            assert!(!ahead.follows());
        }
    }

    /// Whoever reads one after the other never comes to where nothing was asked for, and what is asked for is neither
    /// asked for twice nor left out.
    #[test]
    fn reads_that_follow_one_another_are_always_ahead_of() {
        for len in [4 * KIB, 64 * KIB, 128 * KIB, 1024 * KIB] {
            let mut ahead = Ahead::default();
            assert_eq!(ahead.missed(0, len), None);
            let first = ahead.missed(len, len).unwrap();
            assert_eq!(first.offset, 2 * len);
            assert!(ahead.follows());
            let mut end = first.offset + first.len;
            for step in 2..200 {
                let offset = step * len;
                assert!(offset <= end, "{len}: {offset} was not asked for, only up to {end}");
                if let Some(window) = ahead.hit(offset, len) {
                    assert_eq!(window.offset, end.max(offset + len));
                    assert!(window.len <= WINDOW_MAX);
                    end = window.offset + window.len;
                }
            }
            assert!(end <= 200 * len + 2 * WINDOW_MAX, "{len}");
        }
    }

    #[test]
    fn streams_that_take_turns_are_all_followed() {
        let mut ahead = Ahead::default();
        let mut windows = [0; STREAMS];
        for step in 0..100 {
            for (stream, windows) in windows.iter_mut().enumerate() {
                let offset = ((stream as u64) << 30) + step * 64 * KIB;
                let window =
                    if step < 2 { ahead.missed(offset, 64 * KIB) } else { ahead.hit(offset, 64 * KIB) };
                *windows += u32::from(window.is_some());
            }
        }
        assert!(windows.iter().all(|count| *count >= 10), "{windows:?}");
    }

    #[test]
    fn reads_that_change_places_are_one_sequence() {
        let mut ahead = Ahead::default();
        let mut asked = 0;
        for pair in 0..50 {
            for step in if pair == 0 { [0, 1] } else { [2 * pair + 1, 2 * pair] } {
                asked += ahead.missed(step * 128 * KIB, 128 * KIB).map_or(0, |window| window.len);
            }
        }
        assert!((90 * 128 * KIB..=110 * 128 * KIB).contains(&asked), "{asked}");
    }

    #[test]
    fn stream_that_ended_is_forgotten() {
        let mut ahead = Ahead::default();
        ahead.missed(0, 4 * KIB);
        ahead.missed(4 * KIB, 4 * KIB);
        assert!(ahead.follows());
        for step in 0..u64::from(STRANGERS_MAX) {
            assert_eq!(ahead.hit((100 + step * 3) << 20, 4 * KIB), None);
        }
        assert!(!ahead.follows());
    }

    /// Numbers are a guest's.
    #[test]
    fn numbers_at_the_end_of_what_there_is_do_no_harm() {
        let mut ahead = Ahead::default();
        for _ in 0..3 {
            ahead.missed(u64::MAX - 5000, 4096);
            ahead.missed(u64::MAX - 904, 904);
            ahead.hit(u64::MAX, u64::MAX);
            ahead.missed(u64::MAX, u64::MAX);
        }
    }
}

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
    const MIB: u64 = 1 << 20;

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

    fn window(first: u64, count: u64) -> Option<Window> {
        Some(Window { offset: first * 4 * KIB, len: count * 4 * KIB })
    }

    /// In blocks of 4 KiB, one after the other: each window is asked for when half of the one before is used up, and is
    /// twice as long, up to a bound.
    #[test]
    fn windows_of_a_sequence_double_and_are_asked_for_half_way() {
        let mut ahead = Ahead::default();
        assert_eq!(ahead.missed(0, 4 * KIB), None);
        assert_eq!(ahead.missed(4 * KIB, 4 * KIB), window(2, 4));
        let mut asked = Vec::new();
        for block in 2..400 {
            asked.extend(ahead.hit(block * 4 * KIB, 4 * KIB).map(|window| (block, window)));
        }
        let expected = [(3, 6, 8), (9, 14, 16), (21, 30, 32), (45, 62, 64), (93, 126, 128), (189, 254, 128)];
        let expected = expected.map(|(block, first, count)| (block, window(first, count).unwrap()));
        assert_eq!(asked[..6], expected);
        assert_eq!(asked[6], (317, window(382, 128).unwrap()));
    }

    /// How much is asked for first goes by how much is read at once.
    #[test]
    fn first_window_is_four_reads_long_within_bounds() {
        for (len, expected) in [(512, 16 * KIB), (4 * KIB, 16 * KIB), (8 * KIB, 32 * KIB), (MIB, 128 * KIB)] {
            let mut ahead = Ahead::default();
            ahead.missed(MIB, len);
            assert_eq!(ahead.missed(MIB + len, len), Some(Window { offset: MIB + 2 * len, len: expected }));
        }
    }

    /// A guest that reads beside a sequence, before it or after, does not read on.
    #[test]
    fn reads_beside_a_sequence_are_no_part_of_it() {
        let begun = || {
            let mut ahead = Ahead::default();
            ahead.missed(100 * 4 * KIB, 4 * KIB);
            ahead.missed(101 * 4 * KIB, 4 * KIB);
            ahead
        };
        // It is at block 102, and 106 is the first that was not asked for.
        for (block, is_part) in [(97, false), (98, true), (102, true), (106, true), (107, false)] {
            let mut ahead = begun();
            let hit = ahead.hit(block * 4 * KIB, 4 * KIB);
            assert_eq!(hit, if block == 106 { window(107, 8) } else { None }, "{block}");
            assert_eq!(ahead.strangers, u32::from(!is_part), "{block}");
            // None: it may be the beginning of another one.
            let mut ahead = begun();
            let missed = ahead.missed(block * 4 * KIB, 4 * KIB);
            assert_eq!(missed, if block == 106 { window(107, 8) } else { None }, "{block}");
            let begins = ahead.streams.iter().filter(|stream| stream.used > 0).count() == 2;
            assert_eq!(begins, !is_part, "{block}");
        }
        // One that has only begun goes on at one place.
        for block in [0, 4, 6] {
            let mut ahead = Ahead::default();
            ahead.missed(4 * 4 * KIB, 4 * KIB);
            assert_eq!(ahead.missed(block * 4 * KIB, 4 * KIB), None, "{block}");
        }
        // One that goes back read by read is not followed to anywhere.
        let mut ahead = begun();
        for (block, strangers) in [(98, 0), (97, 1), (99, 0), (97, 1)] {
            assert_eq!(ahead.hit(block * 4 * KIB, 4 * KIB), None);
            assert_eq!(ahead.strangers, strangers, "{block}");
        }
        // Nor are those that need not wait the second of one.
        let mut ahead = begun();
        ahead.missed(MIB, 4 * KIB);
        assert_eq!(ahead.hit(MIB + 4 * KIB, 4 * KIB), None);
    }

    /// A read that is late does not have what was asked for asked for again.
    #[test]
    fn read_that_comes_late_does_not_set_a_sequence_back() {
        let mut ahead = Ahead::default();
        for block in 0..3 {
            ahead.missed(block * 4 * KIB, 4 * KIB);
        }
        assert_eq!(ahead.missed(3 * 4 * KIB, 4 * KIB), window(6, 8));
        assert_eq!(ahead.hit(2 * 4 * KIB, 4 * KIB), None);
        assert_eq!(ahead.hit(9 * 4 * KIB, 4 * KIB), window(14, 16));
        assert_eq!(ahead.hit(6 * 4 * KIB, 4 * KIB), None);
        assert_eq!(ahead.hit(10 * 4 * KIB, 4 * KIB), None);
    }

    /// A new one takes the place of the one that was not seen for longest, whether its reads had to wait or not.
    #[test]
    fn sequence_that_was_not_seen_for_longest_makes_room() {
        for seen_last in 0..STREAMS as u64 {
            for by_hits in [false, true] {
                let mut ahead = Ahead::default();
                let at = |stream: u64, block: u64| (stream << 30) + block * 4 * KIB;
                for stream in 0..STREAMS as u64 {
                    ahead.missed(at(stream, 0), 4 * KIB);
                    ahead.missed(at(stream, 1), 4 * KIB);
                }
                match by_hits {
                    true => ahead.hit(at(seen_last, 2), 4 * KIB),
                    false => ahead.missed(at(seen_last, 2), 4 * KIB),
                };
                ahead.missed(at(9, 0), 4 * KIB);
                let goes = u64::from(seen_last == 0);
                for stream in 0..STREAMS as u64 {
                    let stays = ahead.streams.iter().any(|it| it.window > 0 && it.goes_on_at(at(stream, 3)));
                    assert_eq!(stays, stream != goes, "{stream} of those of which {seen_last} was seen last");
                }
            }
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
        // Each read of it counts anew: its own, and such as have to wait.
        for step in [2, 3, 4] {
            let of_others: Vec<u64> = (1..u64::from(STRANGERS_MAX)).map(|it| (100 + it * 3) << 20).collect();
            of_others.iter().for_each(|offset| assert_eq!(ahead.hit(*offset, 4 * KIB), None));
            assert!(ahead.follows());
            if step == 3 {
                ahead.missed(step * 4 * KIB, 4 * KIB)
            } else {
                ahead.hit(step * 4 * KIB, 4 * KIB)
            };
        }
        for step in 1..=u64::from(STRANGERS_MAX) {
            assert!(ahead.follows());
            assert_eq!(ahead.hit((100 + step * 3) << 20, 4 * KIB), None);
        }
        assert!(!ahead.follows() && ahead.streams.iter().all(|stream| stream.used == 0));
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

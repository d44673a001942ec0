//! Whether there is a connection to be had, and what a read does that finds none. No I/O.

use std::time::{Duration, Instant};

/// Connections that are read over at once, where the server permits more than one.
pub(super) const CONNECTIONS_MAX: usize = 4;
/// How long after a failed attempt to connect the next one is made: at first, and at most.
const BACK_OFF_MIN: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// What a read that wants a connection is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Take an idle one.
    Take,
    /// Make one. It counts as open from now on, until it is [`lost`](Line::lost) or [`refused`](Line::refused).
    Connect,
    /// Wait until something changes, or until then.
    Wait(Instant),
    /// Fail: the server has been away for too long, for this reason.
    GiveUp(String),
}

/// Since when a server has not answered.
#[derive(Debug)]
struct Outage {
    since: Instant,
    why: String,
    next_attempt: Instant,
    back_off: Duration,
}

/// What is known of the way to a server.
#[derive(Debug)]
pub(super) struct Line {
    /// How long a read waits for a server.
    patience: Duration,
    /// Connections that are idle, in use, or being made; and how many there may be.
    open: usize,
    open_max: usize,
    outage: Option<Outage>,
}

impl Line {
    /// Before the first connection.
    pub(super) fn new(patience: Duration) -> Self {
        Self { patience, open: 0, open_max: 1, outage: None }
    }

    /// What a read that began at `began` does at `now`, when `idle` connections are idle.
    pub(super) fn step(&mut self, idle: usize, began: Instant, now: Instant) -> Step {
        let deadline = began + self.patience;
        if now >= deadline {
            let why =
                self.outage.as_ref().map_or("all connections to it are in use", |outage| outage.why.as_str());
            return Step::GiveUp(why.to_owned());
        }
        if idle > 0 {
            return Step::Take;
        }
        let may_open = self.open < self.open_max;
        let Some(outage) = &mut self.outage else {
            self.open += usize::from(may_open);
            return if may_open { Step::Connect } else { Step::Wait(deadline) };
        };
        if may_open && now >= outage.next_attempt {
            self.open += 1;
            outage.next_attempt = now + outage.back_off;
            outage.back_off = (outage.back_off * 2).min(BACK_OFF_MAX);
            return Step::Connect;
        }
        // Others have waited for it already.
        let given_up = outage.since + self.patience;
        if now >= given_up {
            return Step::GiveUp(outage.why.clone());
        }
        let attempt = if may_open { outage.next_attempt } else { deadline };
        Step::Wait(deadline.min(given_up).min(attempt))
    }

    /// A connection, or an attempt to make one, failed that was of use at `since`, the last time that is known. Idle ones are
    /// dropped, as many as `idle`. Whether the outage begins with that.
    pub(super) fn lost(&mut self, idle: usize, since: Instant, now: Instant, why: String) -> bool {
        self.open = self.open.saturating_sub(1 + idle);
        self.open_max = 1;
        let begins = self.outage.is_none();
        let outage = self.outage.get_or_insert(Outage {
            since,
            why: String::new(),
            next_attempt: now,
            back_off: BACK_OFF_MIN,
        });
        outage.why = why;
        begins
    }

    /// A connection besides others could not be made: there are as many as there can be.
    pub(super) fn refused(&mut self) {
        self.open = self.open.saturating_sub(1);
        self.open_max = self.open.max(1);
    }

    /// Whether a connection that is being made is one besides others that work.
    pub(super) fn has_others(&self) -> bool {
        self.outage.is_none() && self.open > 1
    }

    /// A request was answered, over a connection as which there may be others if `multi_conn`. How long that had not
    /// been so, if it had not.
    pub(super) fn answered(&mut self, multi_conn: bool, now: Instant) -> Option<Duration> {
        let outage = self.outage.take()?;
        self.open_max = if multi_conn { CONNECTIONS_MAX } else { 1 };
        Some(now.saturating_duration_since(outage.since))
    }

    /// The first connection is made.
    pub(super) fn connected(&mut self, multi_conn: bool) {
        self.open = 1;
        self.open_max = if multi_conn { CONNECTIONS_MAX } else { 1 };
    }

    /// An idle connection was closed.
    pub(super) fn closed(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    /// Why the server does not answer, if it does not.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.outage.as_ref().map(|outage| outage.why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn away(line: &mut Line, now: Instant) {
        assert_eq!(line.step(0, now, now), Step::Connect);
        line.lost(0, now, now, "refused".into());
    }

    #[test]
    fn reads_share_as_many_connections_as_there_may_be() {
        let (mut line, now) = (Line::new(PATIENCE), Instant::now());
        line.connected(true);
        assert_eq!(line.step(1, now, now), Step::Take);
        for _ in 1..CONNECTIONS_MAX {
            assert_eq!(line.step(0, now, now), Step::Connect);
        }
        assert_eq!(line.step(0, now, now), Step::Wait(now + PATIENCE));
        assert!(line.has_others());
        line.refused();
        assert_eq!(line.step(0, now, now), Step::Wait(now + PATIENCE));
        line.connected(false);
        assert_eq!(line.step(0, now, now), Step::Wait(now + PATIENCE));
    }

    /// A server that is away is tried again and again, by one read at a time and ever less often.
    #[test]
    fn attempts_to_connect_have_a_growing_and_bounded_distance() {
        let (mut line, start) = (Line::new(Duration::from_secs(3600)), Instant::now());
        away(&mut line, start);
        let (mut now, mut waits) = (start, Vec::new());
        for _ in 0..12 {
            assert_eq!(line.step(0, start, now), Step::Connect);
            // While that goes on, others wait for it.
            assert!(matches!(line.step(0, start, now), Step::Wait(until) if until > now + BACK_OFF_MAX));
            line.lost(0, now, now, "refused".into());
            let Step::Wait(until) = line.step(0, start, now) else { panic!("no wait") };
            waits.push(until - now);
            now = until;
        }
        assert_eq!((waits[0], waits[11]), (BACK_OFF_MIN, BACK_OFF_MAX));
        assert!(waits.is_sorted());
    }

    /// No read waits for longer than it may, and none waits anew for a server that others have given up; but it is
    /// tried nevertheless.
    #[test]
    fn reads_give_up_after_their_patience_and_at_once_when_others_have() {
        let (mut line, start) = (Line::new(PATIENCE), Instant::now());
        away(&mut line, start);
        let late = start + PATIENCE;
        assert_eq!(line.step(0, start, late), Step::GiveUp("refused".into()));
        assert_eq!(line.step(0, late, late), Step::Connect);
        assert_eq!(line.step(0, late, late), Step::GiveUp("refused".into()));
        line.lost(0, late, late, "no route".into());
        assert_eq!(line.step(0, late, late), Step::GiveUp("no route".into()));
        assert_eq!(line.trouble(), Some("no route"));
    }

    #[test]
    fn server_that_is_back_is_read_over_all_its_connections_again() {
        let (mut line, start) = (Line::new(PATIENCE), Instant::now());
        line.connected(true);
        assert_eq!(line.step(0, start, start), Step::Connect);
        // One connection of two fails; the other was idle.
        assert!(line.lost(1, start, start, "gone".into()));
        assert_eq!(line.step(0, start, start), Step::Connect);
        assert!(matches!(line.step(0, start, start), Step::Wait(_)), "only one tries");
        // That it connects is not enough.
        let later = start + Duration::from_secs(3);
        assert!(line.trouble().is_some());
        assert_eq!(line.answered(true, later), Some(Duration::from_secs(3)));
        assert_eq!(line.answered(true, later), None);
        assert_eq!((line.step(0, later, later), line.trouble()), (Step::Connect, None));
    }
}

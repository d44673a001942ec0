use proptest::prelude::*;

use super::*;

const GRACE: Duration = Duration::from_secs(5);

fn id(pid: u32, start_ticks: u64) -> ProcessKey {
    ProcessKey::Id(ProcessId { pid, start_ticks })
}

fn process(pid: u32) -> Identity {
    Identity { process: Some(id(pid, 100 + u64::from(pid))), watched: true }
}

const UNKNOWN: Identity = Identity { process: None, watched: false };

/// A boundary with a session of `owner` whose frontend is connected.
fn in_session(owner: Identity, now: Instant) -> Boundary {
    let mut boundary = Boundary::new(GRACE);
    assert_eq!(boundary.connected(owner, now), Admission::Serve);
    assert_eq!(boundary.ring_starts(true, false), RingStart::Begin);
    boundary
}

#[test]
fn session_whose_owner_process_is_gone_at_disconnection_ends_at_once() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    assert_eq!(boundary.disconnected(true, now), Some(EndReason::OwnerExited));
    assert!(!boundary.session_is_open());
}

#[test]
fn session_whose_owner_process_exits_after_disconnection_ends_then() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    assert_eq!(boundary.disconnected(false, now), None);
    assert_eq!(boundary.owner_exited(), Some(EndReason::OwnerExited));
}

#[test]
fn session_whose_owner_lives_stays_open_without_limit() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    assert_eq!(boundary.deadline(), None);
    assert_eq!(boundary.tick(now + Duration::from_secs(1_000_000)), None);
    assert!(boundary.session_is_open());
}

#[test]
fn owner_that_comes_back_continues_its_session() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    assert_eq!(boundary.connected(process(1), now), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, false), RingStart::Continue);
    assert_eq!(boundary.ring_starts(true, false), RingStart::Continue);
}

#[test]
fn process_with_the_owners_pid_and_another_start_time_is_a_stranger() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    let recycled = Identity { process: Some(id(1, 7)), watched: true };
    assert_eq!(boundary.connected(recycled, now), Admission::Hold);
}

#[test]
fn stranger_that_has_waited_the_grace_takes_over() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    let arrival = now + Duration::from_secs(100);
    assert_eq!(boundary.connected(process(2), arrival), Admission::Hold);
    assert!(boundary.connected(process(3), arrival).is_refusal());
    assert_eq!(boundary.tick(arrival + GRACE - Duration::from_millis(1)), None);
    assert_eq!(boundary.deadline(), Some(arrival + GRACE));
    assert_eq!(boundary.tick(arrival + GRACE), Some(Due::Candidate));
    boundary.candidate(process(2));
    assert!(boundary.session_is_open() && boundary.is_candidate());
    assert_eq!(boundary.ring_starts(true, false), RingStart::Succeed);
    assert_eq!(boundary.ring_starts(true, false), RingStart::Continue);
    assert_eq!(boundary.disconnected(true, arrival + GRACE), Some(EndReason::OwnerExited));
}

/// A boundary with a session of process 1, which is away, and a candidate, process 2, that is served.
fn with_candidate(now: Instant) -> Boundary {
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    boundary.connected(process(2), now);
    assert_eq!(boundary.tick(now + GRACE), Some(Due::Candidate));
    boundary.candidate(process(2));
    boundary
}

/// Invariant 3: who may not have a session of its own ends nobody's, nor does one who starts nothing.
#[test]
fn candidate_that_gets_no_session_ends_none() {
    let now = Instant::now();
    for starts in [false, true] {
        let mut boundary = with_candidate(now);
        if starts {
            assert!(matches!(boundary.ring_starts(false, false), RingStart::Refuse(_)));
        }
        assert_eq!(boundary.disconnected(true, now + GRACE), None);
        assert!(boundary.session_is_open() && boundary.is_owner(process(1)));
        assert_eq!(boundary.connected(process(1), now + GRACE), Admission::Serve);
        assert_eq!(boundary.ring_starts(false, false), RingStart::Continue);
    }
}

#[test]
fn owner_that_comes_back_while_a_candidate_is_served_goes_first() {
    let now = Instant::now();
    let mut boundary = with_candidate(now);
    assert!(boundary.connected(process(3), now).is_refusal());
    assert_eq!(boundary.connected(process(1), now), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, false), RingStart::Continue);
}

#[test]
fn session_whose_owner_exits_while_a_candidate_is_served_ends_and_leaves_that_connected() {
    let now = Instant::now();
    let mut boundary = with_candidate(now);
    assert_eq!(boundary.owner_exited(), Some(EndReason::OwnerExited));
    assert!(!boundary.session_is_open());
    assert!(matches!(boundary.ring_starts(false, false), RingStart::Refuse(_)));
    assert_eq!(boundary.ring_starts(true, false), RingStart::Begin);
    // So it is if the operator ends it.
    let mut boundary = with_candidate(now);
    assert_eq!(boundary.operator_end(), Some(EndReason::Operator));
    assert_eq!(boundary.ring_starts(true, false), RingStart::Begin);
}

#[test]
fn owner_that_comes_back_while_a_stranger_waits_goes_first() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    boundary.connected(process(2), now);
    assert_eq!(boundary.connected(process(1), now), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, false), RingStart::Continue);
}

#[test]
fn stranger_that_leaves_again_ends_nothing() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    boundary.connected(process(2), now);
    boundary.stranger_left();
    assert_eq!(boundary.tick(now + GRACE * 10), None);
}

#[test]
fn owner_that_comes_back_after_a_takeover_is_refused() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    boundary.connected(process(2), now);
    boundary.tick(now + GRACE);
    boundary.candidate(process(2));
    assert_eq!(boundary.ring_starts(true, false), RingStart::Succeed);
    assert!(boundary.connected(process(1), now).is_refusal());
    assert_eq!(boundary.disconnected(true, now), Some(EndReason::OwnerExited));
    // Later still: it is let in, but its rings tell that it belongs to no new session.
    assert_eq!(boundary.connected(process(1), now), Admission::Serve);
    assert!(matches!(boundary.ring_starts(false, false), RingStart::Refuse(_)));
}

#[test]
fn session_of_an_unknown_process_ends_when_the_grace_has_passed() {
    let now = Instant::now();
    let mut boundary = in_session(UNKNOWN, now);
    assert_eq!(boundary.disconnected(false, now), None);
    assert_eq!(boundary.connected(UNKNOWN, now), Admission::Hold);
    assert_eq!(boundary.tick(now + GRACE), Some(Due::End(EndReason::Disconnected)));
    assert_eq!(boundary.connected(UNKNOWN, now + GRACE), Admission::Serve);
}

#[test]
fn second_frontend_is_turned_away_and_disturbs_nothing() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    assert!(boundary.connected(process(2), now).is_refusal());
    assert!(boundary.connected(process(1), now).is_refusal());
    assert_eq!(boundary.ring_starts(true, false), RingStart::Continue);
}

/// Invariant 3: a guest of an earlier session whose first ring happens to be unused is found out by
/// its other rings, before it goes on with a disk that was reset; nor does it when it connects again.
#[test]
fn ring_that_continues_in_a_session_that_was_begun_just_now_is_refused() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    for fresh in [false, true] {
        assert!(matches!(boundary.ring_starts(fresh, false), RingStart::Refuse(_)));
    }
    assert_eq!(boundary.disconnected(false, now), Some(EndReason::Mistaken));
    assert!(!boundary.session_is_open());
    assert_eq!(boundary.connected(process(1), now), Admission::Serve);
    assert!(matches!(boundary.ring_starts(false, false), RingStart::Refuse(_)));
}

#[test]
fn frontend_that_never_starts_a_ring_leaves_no_session() {
    let now = Instant::now();
    let mut boundary = Boundary::new(GRACE);
    boundary.connected(process(1), now);
    assert_eq!(boundary.disconnected(false, now), None);
    assert!(!boundary.session_is_open());
    boundary.connected(process(2), now);
    assert_eq!(boundary.ring_starts(true, false), RingStart::Begin);
    boundary.begin_failed();
    assert_eq!(boundary.disconnected(true, now), None);
    assert!(!boundary.session_is_open());
}

#[test]
fn operator_ends_a_session_in_every_state() {
    let now = Instant::now();
    let mut boundary = in_session(process(1), now);
    assert_eq!(boundary.operator_end(), Some(EndReason::Operator));
    assert_eq!(boundary.operator_end(), None);
    let mut boundary = in_session(process(1), now);
    boundary.disconnected(false, now);
    assert_eq!(boundary.operator_end(), Some(EndReason::Operator));
}

#[test]
fn boundary_with_an_unclaimed_session_ends_it_after_the_grace() {
    let now = Instant::now();
    let mut boundary = Boundary::with_open_session(UNKNOWN, GRACE, now);
    assert!(boundary.session_is_open());
    assert_eq!(boundary.tick(now + GRACE), Some(Due::End(EndReason::Disconnected)));
}

/// Invariant 3: a restart of the server ends no session whose owner lives.
#[test]
fn boundary_after_a_restart_waits_for_the_owner_and_knows_it_again() {
    let now = Instant::now();
    let mut boundary = Boundary::with_open_session(process(1), GRACE, now);
    assert_eq!(boundary.tick(now + 100 * GRACE), None);
    assert_eq!(boundary.connected(process(2), now), Admission::Hold);
    assert_eq!(boundary.connected(process(1), now), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, true), RingStart::Continue);
    let mut boundary = Boundary::with_open_session(process(1), GRACE, now);
    assert_eq!(boundary.owner_exited(), Some(EndReason::OwnerExited));
}

/// Invariants 2 and 3: an owner that can't be told by its process is told by its token, and nobody
/// without it is served in its session.
#[test]
fn boundary_after_a_restart_knows_an_owner_without_a_process_by_its_token() {
    let now = Instant::now();
    let orphaned = || Boundary::with_open_session(UNKNOWN, GRACE, now);
    let mut boundary = orphaned();
    assert_eq!(boundary.connected(UNKNOWN, now), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, true), RingStart::Continue);
    assert_eq!(boundary.ring_starts(true, false), RingStart::Continue);
    let mut boundary = orphaned();
    assert_eq!(boundary.connected(process(7), now), Admission::Serve);
    assert!(matches!(boundary.ring_starts(true, false), RingStart::Refuse(_)));
    // Its end says nothing of the owner's.
    assert_eq!(boundary.disconnected(true, now), None);
    assert!(boundary.session_is_open() && !boundary.is_owner(process(7)));
    assert_eq!(boundary.connected(UNKNOWN, now), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, true), RingStart::Continue);
    let mut boundary = orphaned();
    assert_eq!(boundary.connected(process(7), now), Admission::Serve);
    assert_eq!(boundary.disconnected(false, now + GRACE), Some(EndReason::Disconnected));
}

/// Invariant 3: whoever was there first and shows nothing does not keep the owner out, nor does it gain time for a session without one.
#[test]
fn frontend_that_does_not_prove_to_be_the_owner_gives_way_to_another() {
    let now = Instant::now();
    let mut boundary = Boundary::with_open_session(UNKNOWN, GRACE, now);
    assert_eq!(boundary.connected(process(7), now), Admission::Serve);
    assert!(boundary.connected(UNKNOWN, now + PROOF - Duration::from_millis(1)).is_refusal());
    let mut without = boundary;
    assert_eq!(boundary.connected(UNKNOWN, now + PROOF), Admission::Serve);
    assert_eq!(boundary.ring_starts(false, true), RingStart::Continue);
    assert!(boundary.connected(process(7), now + 2 * PROOF).is_refusal());
    assert_eq!(without.connected(process(8), now + PROOF), Admission::Serve);
    assert!(without.connected(process(9), now + PROOF).is_refusal());
    assert_eq!(without.disconnected(false, now + GRACE), Some(EndReason::Disconnected));
}

impl Admission {
    fn is_refusal(self) -> bool {
        matches!(self, Admission::Refuse(_))
    }
}

#[derive(Clone, Debug)]
enum Event {
    Connect(usize),
    StrangerLeaves,
    RingStarts(bool),
    BeginFails,
    Disconnect,
    Exit(usize),
    Pass(u64),
    Operator,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0usize..4).prop_map(Event::Connect),
        1 => Just(Event::StrangerLeaves),
        3 => any::<bool>().prop_map(Event::RingStarts),
        1 => Just(Event::BeginFails),
        3 => Just(Event::Disconnect),
        1 => (0usize..4).prop_map(Event::Exit),
        2 => (0u64..8).prop_map(Event::Pass),
        1 => Just(Event::Operator),
    ]
}

proptest! {
    /// Invariant 2 at the boundary: whatever happens, a session has one owner, begins and ends
    /// alternate, and nobody else is served in it; it ends for a reason that is true.
    #[test]
    fn session_under_any_events_belongs_to_one_owner(events in prop::collection::vec(event(), 1..60)) {
        // Peers 0 to 2 are processes, peer 3 can't be told from others.
        let peer = |index: usize| if index == 3 { UNKNOWN } else { process(index as u32) };
        let mut boundary = Boundary::new(GRACE);
        let mut now = Instant::now();
        let mut dead = [false; 4];
        let (mut served, mut session): (Option<usize>, Option<usize>) = (None, None);
        let mut held: Option<(usize, Instant)> = None;
        let mut left_at = now;
        // Whether the session was begun over the connection that is served, and for a guest of another one.
        let (mut begun_here, mut mistaken) = (false, false);
        // Whether who is served is a candidate for the session of another one.
        let mut candidate = false;
        for event in events {
            let mut ended = None;
            match event {
                Event::Connect(index) if !dead[index] => match boundary.connected(peer(index), now) {
                    Admission::Serve => {
                        prop_assert!(served.is_none() || candidate && session.is_some());
                        prop_assert!(session.is_none_or(|owner| owner == index && owner != 3));
                        (served, held, begun_here, candidate) = (Some(index), None, false, false);
                        prop_assert!(!mistaken);
                    }
                    Admission::Hold => {
                        prop_assert!(served.is_none() && session.is_some() && held.is_none());
                        held = Some((index, now));
                    }
                    Admission::Refuse(_) => prop_assert!(served.is_some() || held.is_some()),
                },
                Event::StrangerLeaves => {
                    boundary.stranger_left();
                    held = None;
                }
                Event::RingStarts(fresh) if served.is_some() => match boundary.ring_starts(fresh, false) {
                    RingStart::Begin => {
                        prop_assert!(session.is_none() && fresh);
                        (session, begun_here) = (served, true);
                    }
                    RingStart::Succeed => {
                        prop_assert!(candidate && fresh && session.is_some() && session != served);
                        (session, begun_here, candidate) = (served, true, false);
                    }
                    RingStart::Continue => {
                        prop_assert_eq!(session, served);
                        prop_assert!(!mistaken && (fresh || !begun_here));
                    }
                    RingStart::Refuse(_) => {
                        prop_assert!(mistaken || !fresh && (session.is_none() || begun_here || candidate));
                        mistaken = session.is_some() && !candidate;
                    }
                },
                Event::BeginFails if session.is_none() => boundary.begin_failed(),
                Event::Disconnect => if let Some(index) = served.take() {
                    if !std::mem::take(&mut candidate) {
                        left_at = now;
                    }
                    ended = boundary.disconnected(dead[index], now);
                },
                Event::Exit(index) if index != 3 => {
                    dead[index] = true;
                    if session == Some(index) && (served.is_none() || candidate) {
                        ended = boundary.owner_exited();
                        prop_assert!(ended.is_some());
                    }
                }
                Event::Pass(seconds) => {
                    now += Duration::from_secs(seconds);
                    match boundary.tick(now) {
                        Some(Due::End(reason)) => ended = Some(reason),
                        Some(Due::Candidate) => {
                            let (index, since) = held.take().unwrap();
                            prop_assert!(now >= since + GRACE && session != Some(3));
                            boundary.candidate(peer(index));
                            (served, candidate) = (Some(index), true);
                        }
                        None => {}
                    }
                }
                Event::Operator => {
                    ended = boundary.operator_end();
                    prop_assert_eq!(ended.is_some(), session.is_some());
                    if ended.is_some() && !candidate {
                        served = None;
                    }
                }
                _ => {}
            }
            if let Some(reason) = ended {
                let owner = session.take();
                prop_assert!(owner.is_some() && (served.is_none() || std::mem::take(&mut candidate)));
                match reason {
                    EndReason::OwnerExited => prop_assert!(dead[owner.unwrap()]),
                    EndReason::Disconnected => {
                        prop_assert!(owner == Some(3) && now >= left_at + GRACE);
                    }
                    EndReason::TakenOver => prop_assert!(false, "the ring's start says it"),
                    EndReason::Mistaken => prop_assert!(mistaken),
                    EndReason::Operator => {}
                }
                mistaken = false;
                if let Some((index, _)) = held.take() {
                    prop_assert_eq!(boundary.connected(peer(index), now), Admission::Serve);
                    served = Some(index);
                }
            }
            prop_assert_eq!(boundary.session_is_open(), session.is_some());
        }
    }
}

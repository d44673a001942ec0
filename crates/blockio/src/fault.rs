//! Faults on demand, for tests: an engine around any other that fails or delays chosen operations.
//!
//! A [`FaultPlan`] is shared by any number of engines and may be changed while they work.

use std::{
    collections::HashMap,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::{Completion, Deadline, Engine, FileIndex, Op};

/// Kinds of operations.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OpClass {
    /// [`Op::Read`].
    Read,
    /// [`Op::Write`].
    Write,
    /// [`Op::SyncData`].
    SyncData,
    /// [`Op::Punch`].
    Punch,
    /// [`Op::Zero`].
    Zero,
    /// [`Op::Share`].
    Share,
}

impl OpClass {
    /// The kind of `op`.
    pub fn of(op: &Op) -> OpClass {
        match op {
            Op::Read { .. } => OpClass::Read,
            Op::Write { .. } => OpClass::Write,
            Op::SyncData { .. } => OpClass::SyncData,
            Op::Punch { .. } => OpClass::Punch,
            Op::Zero { .. } => OpClass::Zero,
            Op::Share { .. } => OpClass::Share,
        }
    }
}

/// An operation that a plan decides on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpInfo {
    /// Its kind.
    pub class: OpClass,
    /// How many of its kind were pushed before it, to all engines of the plan.
    pub nth: u64,
    /// Its file.
    pub file: FileIndex,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Not performed; completes with this error number.
    Fail(i32),
    /// Performed, but completes with this error number.
    FailAfter(i32),
    /// Performed only when released. Dropping the engine before means that it never happens.
    HoldBefore,
    /// Performed at once, completes when released.
    HoldAfter,
}

type Rule = Box<dyn FnMut(&OpInfo) -> Option<Fault> + Send>;

/// Decides the fate of operations.
#[derive(Default)]
pub struct FaultPlan {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    seen: HashMap<OpClass, u64>,
    /// Holds are numbered in the order of the pushes; those below `released` are over.
    holds: u64,
    released: u64,
    bells: Vec<Weak<OwnedFd>>,
}

impl FaultPlan {
    /// A plan under which everything passes.
    pub fn new() -> Arc<FaultPlan> {
        Arc::default()
    }

    /// Adds a rule. The first one that has an answer decides; if none has, the operation passes.
    pub fn rule(&self, rule: impl FnMut(&OpInfo) -> Option<Fault> + Send + 'static) {
        self.state().rules.push(Box::new(rule));
    }

    /// The operation of `class` before which `nth` others were pushed meets `fault`.
    pub fn on(&self, class: OpClass, nth: u64, fault: Fault) {
        self.rule(move |op| (op.class == class && op.nth == nth).then_some(fault));
    }

    /// All operations of `class` from now on meet `fault`.
    pub fn on_every(&self, class: OpClass, fault: Fault) {
        self.rule(move |op| (op.class == class).then_some(fault));
    }

    /// Removes all rules. What is held stays held.
    pub fn clear(&self) {
        self.state().rules.clear();
    }

    /// How many operations of `class` were pushed.
    pub fn seen(&self, class: OpClass) -> u64 {
        self.state().seen.get(&class).copied().unwrap_or(0)
    }

    /// How many operations are held.
    pub fn held(&self) -> u64 {
        let state = self.state();
        state.holds - state.released
    }

    /// Ends the hold of the operation that was held first.
    pub fn release_one(&self) {
        self.release(1);
    }

    /// Ends all holds of now.
    pub fn release_all(&self) {
        self.release(u64::MAX);
    }

    fn release(&self, count: u64) {
        let mut state = self.state();
        state.released = state.released.saturating_add(count).min(state.holds);
        state.bells.retain(|bell| bell.upgrade().is_some_and(|bell| ring(&bell)));
    }

    fn decide(&self, op: &Op) -> (Option<Fault>, u64) {
        let mut state = self.state();
        let class = OpClass::of(op);
        let seen = state.seen.entry(class).or_insert(0);
        let info = OpInfo { class, nth: *seen, file: op.file(), offset: op.offset(), len: op.len() };
        *seen += 1;
        let fault = state.rules.iter_mut().find_map(|rule| rule(&info));
        let hold = state.holds;
        if matches!(fault, Some(Fault::HoldBefore | Fault::HoldAfter)) {
            state.holds += 1;
        }
        (fault, hold)
    }

    fn is_released(&self, hold: u64) -> bool {
        hold < self.state().released
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("FaultPlan")
            .field("rules", &state.rules.len())
            .field("seen", &state.seen)
            .field("held", &(state.holds - state.released))
            .finish()
    }
}

fn ring(bell: &OwnedFd) -> bool {
    rustix::io::write(bell, &1u64.to_ne_bytes()).is_ok()
}

/// What is still to be done to an operation that the inner engine performs.
#[derive(Clone, Copy, Debug)]
enum After {
    Pass,
    Fail(i32),
    Hold(u64),
}

/// An engine under a [`FaultPlan`].
#[derive(Debug)]
pub struct FaultEngine {
    inner: Box<dyn Engine>,
    plan: Arc<FaultPlan>,
    /// An event counter that makes `gate` readable for what the inner engine knows nothing of.
    bell: Arc<OwnedFd>,
    /// An epoll of the bell and the inner engine.
    gate: OwnedFd,
    pushed: Vec<(u64, Op, Option<Fault>, u64)>,
    /// Operations that are held before they are performed, with their hold.
    held_ops: Vec<(u64, u64, Op)>,
    /// Completions that are held, with their hold.
    held_done: Vec<(u64, Completion)>,
    /// What the inner engine works at, by its token: our token, and what comes afterwards.
    inside: HashMap<u64, (u64, After)>,
    next_token: u64,
    ready: Vec<Completion>,
}

impl FaultEngine {
    /// Puts `inner` under `plan`.
    ///
    /// # Errors
    /// If the kernel has no descriptors to spare.
    pub fn new(inner: Box<dyn Engine>, plan: Arc<FaultPlan>) -> io::Result<FaultEngine> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let gate = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let readable = epoll::EventFlags::IN;
        epoll::add(&gate, &*bell, epoll::EventData::new_u64(0), readable)?;
        if let Some(fd) = inner.completion_fd() {
            epoll::add(&gate, fd, epoll::EventData::new_u64(1), readable)?;
        }
        plan.state().bells.push(Arc::downgrade(&bell));
        Ok(FaultEngine {
            inner,
            plan,
            bell,
            gate,
            pushed: Vec::new(),
            held_ops: Vec::new(),
            held_done: Vec::new(),
            inside: HashMap::new(),
            next_token: 0,
            ready: Vec::new(),
        })
    }

    fn perform(&mut self, token: u64, op: Op, after: After) {
        self.inside.insert(self.next_token, (token, after));
        self.inner.push(self.next_token, op);
        self.next_token += 1;
    }

    /// Moves everything on as far as it goes without waiting.
    fn pump(&mut self) {
        let mut count = [0; 8];
        // Before looking at what is released, so that no ring of the bell is lost.
        let _ = rustix::io::read(&*self.bell, &mut count);
        let plan = self.plan.clone();
        let free: Vec<_> = take_if(&mut self.held_ops, |(hold, ..)| plan.is_released(*hold));
        if !free.is_empty() {
            for (_, token, op) in free {
                self.perform(token, op, After::Pass);
            }
            self.inner.submit();
        }
        let mut done = Vec::new();
        self.inner.reap(&mut done);
        for mut completion in done {
            let Some((token, after)) = self.inside.remove(&completion.token) else { continue };
            completion.token = token;
            match after {
                After::Pass => self.ready.push(completion),
                After::Fail(errno) => {
                    completion.result = Err(io::Error::from_raw_os_error(errno));
                    self.ready.push(completion);
                }
                After::Hold(hold) => self.held_done.push((hold, completion)),
            }
        }
        let free = take_if(&mut self.held_done, |(hold, _)| plan.is_released(*hold));
        self.ready.extend(free.into_iter().map(|(_, completion)| completion));
    }
}

/// Takes out of `list` what `which` is true for.
fn take_if<T>(list: &mut Vec<T>, which: impl Fn(&T) -> bool) -> Vec<T> {
    let (out, stay) = std::mem::take(list).into_iter().partition(which);
    *list = stay;
    out
}

impl Engine for FaultEngine {
    fn push(&mut self, token: u64, op: Op) {
        let (fault, hold) = self.plan.decide(&op);
        self.pushed.push((token, op, fault, hold));
    }

    fn submit(&mut self) {
        for (token, op, fault, hold) in std::mem::take(&mut self.pushed) {
            match fault {
                None => self.perform(token, op, After::Pass),
                Some(Fault::FailAfter(errno)) => self.perform(token, op, After::Fail(errno)),
                Some(Fault::HoldAfter) => self.perform(token, op, After::Hold(hold)),
                Some(Fault::HoldBefore) => self.held_ops.push((hold, token, op)),
                Some(Fault::Fail(errno)) => {
                    let result = Err(io::Error::from_raw_os_error(errno));
                    self.ready.push(Completion { token, result, buf: op.into_buf() });
                }
            }
        }
        self.inner.submit();
        // Something may be ready that the inner engine's descriptor does not tell of.
        ring(&self.bell);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.pump();
        done.append(&mut self.ready);
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let deadline = Deadline::after(timeout);
        loop {
            self.pump();
            let idle = self.in_flight() == self.pushed.len();
            if !self.ready.is_empty() || idle || deadline.is_over() {
                // Still to be reaped, so the descriptor must be readable again.
                ring(&self.bell);
                return Ok(());
            }
            deadline.poll(&self.gate)?;
        }
    }

    fn in_flight(&self) -> usize {
        let held = self.held_ops.len() + self.held_done.len();
        self.pushed.len() + held + self.inside.len() + self.ready.len()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.gate.as_fd())
    }
}

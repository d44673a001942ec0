//! What a queue's thread does: takes requests from the ring, gives them to the disk, publishes
//! their answers, and looks for more for a while before it sleeps.
//!
//! Order within a pass: pop what is available, log first touches with one append, submit once, reap, status bytes,
//! used elements, used index; where much is done at once, status bytes to used index for each group of it. The
//! ring's lock is not held while the disk is at work, nor while polling.
//!
//! Answers are published soon and in small groups as long as requests are done at once, so that a guest that
//! is awake goes on while the next ones are done. Interrupts are for a guest that sleeps (see
//! [`interrupts`](crate::interrupts)).
//!
//! When a ring starts, the first pass looks into the in-flight table (see [`inflight`](crate::inflight))
//! for where to begin, and takes first what a server before has taken and not answered.

mod resume;

use std::{collections::VecDeque, sync::Arc, time::Instant};

use blockio::GuestBuf;
use blocks::BlockRange;
use session_disk::Request;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::{
    backend::Device,
    chain::{Table, avail_head},
    disk::{DiskIo, Finished, Outcome},
    inflight::InflightQueue,
    interrupts::Interrupts,
    poll::{PollWindow, Polling},
    request::{Action, Data, Memory, Parsed, Parser, Status, parts_of},
    slots::{Slot, Slots, Used, part_token},
    used::{Watch, avail_index, publish, want_no_kick, wants_interrupt},
    vring::Vring,
};

/// How often the ring is looked at between two looks at the clock.
const LOOKS_PER_TIME: u32 = 16;
/// How many requests are done at once before their answers are published, at most.
pub(crate) const GROUP: usize = 8;
/// How many such groups are taken at a time while there are first touches among them: those of all groups are logged
/// with one append, which may be a system call and take longer than a write.
const GROUPS_LOGGED: usize = 4;

/// The data path of one virtqueue.
pub(crate) struct Worker {
    /// Number of the queue.
    index: usize,
    io: Box<dyn DiskIo>,
    slots: Slots,
    parser: Parser,
    /// Requests that were taken and are not started, by their heads.
    batch: Vec<(u16, Parsed)>,
    /// Writes of the batch that are made when their blocks are logged.
    announced: Vec<(u16, Parsed)>,
    poll: PollWindow,
    finished: Vec<Finished>,
    answers: Vec<Used>,
    /// Whether all requests of the last pass that had some were done at once.
    all_at_once: bool,
    /// Whether no request of it was.
    none_at_once: bool,
    /// Whether there were first touches among them.
    first_touches: bool,
    interrupts: Interrupts,
    /// Which start of the ring the requests were taken after.
    started: u32,
    /// Where requests in flight are noted, if the frontend wants that.
    inflight: Option<InflightQueue>,
    /// The heads of those that were in flight when the ring was started, and are not done again yet.
    again: VecDeque<u16>,
    /// Where the guest's next request will show up.
    watch: Option<Watch>,
    /// Whether the guest was asked for a kick, and not to leave it since.
    armed: bool,
}

/// What became of a pass.
#[derive(PartialEq, Eq)]
enum Pass {
    /// Something was taken or answered.
    Worked,
    Idle,
    /// The ring is not started, not enabled, or makes no sense, or its answers can't be published: nothing may be taken from
    /// it.
    Stopped,
}

impl Worker {
    /// A worker for queue `index`, of at most `queue_size` elements.
    pub(crate) fn new(index: usize, io: Box<dyn DiskIo>, queue_size: u16, polling: Polling) -> Self {
        let room = usize::from(queue_size);
        Self {
            index,
            io,
            slots: Slots::new(queue_size),
            parser: Parser::default(),
            batch: Vec::with_capacity(room),
            announced: Vec::new(),
            poll: PollWindow::new(polling),
            finished: Vec::with_capacity(room),
            answers: Vec::with_capacity(room),
            all_at_once: false,
            none_at_once: false,
            first_touches: false,
            interrupts: Interrupts::new(),
            started: 0,
            inflight: None,
            again: VecDeque::new(),
            watch: None,
            armed: false,
        }
    }

    pub(crate) fn io(&self) -> &dyn DiskIo {
        self.io.as_ref()
    }

    #[cfg(test)]
    pub(crate) fn io_mut(&mut self) -> &mut dyn DiskIo {
        self.io.as_mut()
    }

    /// Serves the queue until there is nothing left to do; then the thread may sleep until a kick
    /// or a completion.
    pub(crate) fn run(&mut self, device: &Device, vring: &Vring) {
        let idle = self.poll.woken(Instant::now());
        if self.is_quiet() {
            self.interrupts.slept(idle);
        }
        while !device.is_stopping() {
            match self.pass(device, vring) {
                Pass::Worked => continue,
                Pass::Stopped => {
                    self.tell(device, vring);
                    return;
                }
                Pass::Idle => self.tell(device, vring),
            }
            if !self.spin(device, vring) && !self.arm(device, vring) {
                return;
            }
        }
        // Nothing is taken any more, but other queues may wait for what this one's finished requests hold.
        self.finish(device, Some(vring));
    }

    /// Answers what is finished, without waiting and without taking more. For the rest, its
    /// descriptors become readable. `vring`: the queue's ring, if it was ever started.
    pub(crate) fn finish(&mut self, device: &Device, vring: Option<&Vring>) {
        self.watch = None;
        self.io.submit();
        self.io.reap(&mut self.finished);
        self.collect();
        if let Some(vring) = vring {
            self.publish(device, vring);
            self.tell(device, vring);
        }
        self.answers.clear();
    }

    /// Waits for everything that is in flight and publishes the answers. The ring's state does not
    /// matter: its requests were taken while it was started.
    pub(crate) fn drain(&mut self, device: &Device, vring: Option<&Vring>) {
        loop {
            self.io.quiesce(&mut self.finished);
            self.finish(device, vring);
            // What is to be done again counts as taken. Who stops leaves it to the next server.
            let rest = vring.filter(|_| !self.again.is_empty() && !device.is_stopping());
            let Some(vring) = rest else { break };
            let memory = device.memory();
            self.parser.begin(&memory);
            self.take_again(device, vring.lock().get_queue());
            self.start_batch(device, vring, &memory);
            self.io.submit();
        }
        self.again.clear();
        if self.io.in_flight() > 0 || !self.slots.is_empty() {
            log::error!("{} requests are left after a queue was drained", self.io.in_flight());
        }
    }

    /// Whether no request is on its way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.io.in_flight() == 0
    }

    fn pass(&mut self, device: &Device, vring: &Vring) -> Pass {
        self.watch = None;
        if !self.answers.is_empty() {
            self.io.reap(&mut self.finished);
            self.collect();
            self.publish(device, vring);
            if !self.answers.is_empty() {
                return Pass::Stopped;
            }
        }
        let before = device.memory();
        let (memory, taken) = {
            let mut state = vring.lock();
            let active = state.is_enabled() && state.get_queue().ready();
            // What is available now may lie in memory that was added just before. So: this first, then the memory
            // as it is mapped, and no request is taken that became available later.
            let available = avail_index(&before, state.get_queue().avail_ring()).ok();
            let memory = device.memory();
            self.parser.begin(&memory);
            let starts = vring.starts();
            let taken = if !active {
                None
            } else if starts != self.started && self.resume(device, state.get_queue_mut(), &memory).is_none()
            {
                // Tried again when the memory has changed.
                None
            } else {
                self.started = starts;
                let queue = state.get_queue_mut();
                if self.again.is_empty() {
                    let count = available.map_or(0, |index| index.wrapping_sub(queue.next_avail()));
                    self.pop(device, queue, &memory, count.into())
                } else {
                    Some(self.take_again(device, queue))
                }
            };
            (memory, taken)
        };
        // Even if the ring has turned out to make no sense after requests were taken.
        if !self.batch.is_empty() {
            self.start_batch(device, vring, &memory);
            self.io.submit();
        } else {
            self.parser.end();
        }
        if self.io.in_flight() > 0 {
            self.io.reap(&mut self.finished);
        }
        self.collect();
        let answered = !self.answers.is_empty();
        self.end_group(device, vring, 0);
        match taken {
            None => Pass::Stopped,
            Some(0) if !answered => Pass::Idle,
            Some(_) => Pass::Worked,
        }
    }

    /// Publishes what is answered, and interrupts the guest if it is time. `taken`: so many requests are still to be
    /// done at once of those that were taken.
    fn end_group(&mut self, device: &Device, vring: &Vring, taken: usize) {
        self.publish(device, vring);
        // Only what is done at once leaves more to do; what else is left comes by itself.
        let left = self.watch.as_ref().map_or(0, Watch::left).saturating_add(taken as u16);
        if self.interrupts.is_due(left, Instant::now) {
            self.tell(device, vring);
            if left > 0 {
                self.interrupts.goes_on(Instant::now());
            }
        }
    }

    /// Takes the next `count` requests, as far as there is room. `None`: the ring makes no sense.
    fn pop(&mut self, device: &Device, queue: &mut Queue, memory: &Arc<Memory>, count: usize) -> Option<u32> {
        let (avail_ring, size) = (queue.avail_ring(), u64::from(queue.size()));
        // The library logs what it can't read; a guest must not be able to fill the log.
        let avail_len = 6 + 2 * size as usize;
        if !GuestMemoryBackend::check_range(memory.as_ref(), GuestAddress(avail_ring), avail_len) {
            device.warn(|| format!("a ring at {avail_ring:#x} is not in the guest's memory"));
            return None;
        }
        if !queue.event_idx_enabled() {
            queue.disable_notification(memory.as_ref()).ok()?;
        }
        let groups = if self.first_touches { GROUPS_LOGGED } else { 1 };
        let limit = if self.all_at_once { self.interrupts.group() * groups } else { usize::MAX };
        let room = if self.can_take() { self.slots.room().min(limit).min(count) } else { 0 };
        if count > usize::from(queue.size()) {
            // More than there can be (2.7.13.3): what they are, nobody knows.
            device.warn(|| format!("the guest's available ring can't be used: it has {count} requests"));
            return None;
        }
        let table = Table::of(queue);
        let mut taken = 0;
        for index in (0..room).map(|taken| queue.next_avail().wrapping_add(taken as u16)) {
            let Some(head) = avail_head(queue, self.parser.memory(), index) else { break };
            taken += 1;
            if let Some(inflight) = &mut self.inflight {
                inflight.popped(head);
            }
            let parsed = self.parser.parse(table, head, &device.disk, device.config.read_only);
            if self.batch.is_empty() {
                self.expect(&parsed);
            }
            self.batch.push((head, parsed));
            if self.parser.is_full() {
                break;
            }
        }
        queue.set_next_avail(queue.next_avail().wrapping_add(taken as u16));
        self.watch = Some(Watch { memory: memory.clone(), avail_ring, next_avail: queue.next_avail() });
        Some(taken)
    }

    /// Has the data of a request that is about to be started brought near.
    fn expect(&self, parsed: &Parsed) {
        if let Action::Read { range, .. } = &parsed.action {
            self.io.expect_read(*range);
        }
    }

    /// Starts or answers what was taken, and publishes group after group of answers except the last.
    fn start_batch(&mut self, device: &Device, vring: &Vring, memory: &Arc<Memory>) {
        let mut batch = std::mem::take(&mut self.batch);
        let durable = device.is_write_through();
        self.none_at_once = true;
        let mut requests = batch.drain(..);
        while let Some((head, Parsed { status_at, action })) = requests.next() {
            // While one is copied the next one comes near; more than that at a time would only wait for each other.
            if let Some((_, next)) = requests.as_slice().first() {
                self.expect(next);
            }
            let done = match (&action, status_at) {
                (Action::Answer { status, written }, _) => {
                    if *status == Status::IoError {
                        device.warn(|| "a guest's request is malformed or out of range".to_owned());
                    }
                    Some((*status, *written))
                }
                (Action::Read { range, data }, Some(_)) => {
                    let view = self.parser.view(*data);
                    view.is_some_and(|view| self.io.read_now(*range, view)).then_some((Status::Ok, data.len))
                }
                (Action::Write { range, data }, Some(_)) => {
                    let done = self.write_now(*range, *data, durable);
                    if !done && self.io.announce(*range) {
                        self.announced.push((head, Parsed { status_at, action }));
                        continue;
                    }
                    done.then_some((Status::Ok, 0))
                }
                _ => None,
            };
            match done {
                Some((status, written)) => {
                    self.answers.push(self.parser.answer(head, status_at, status, written));
                    self.none_at_once = false;
                    self.end_group_if_full(device, vring, requests.len() + self.announced.len());
                }
                None => self.start(memory, head, status_at, action, durable),
            }
        }
        drop(requests);
        self.batch = batch;
        self.first_touches = !self.announced.is_empty();
        if self.first_touches {
            self.start_announced(device, vring, memory, durable);
        }
        self.parser.end();
        self.all_at_once = self.slots.is_empty();
    }

    /// Logs the first touches of a batch, all at once, and makes their writes.
    fn start_announced(&mut self, device: &Device, vring: &Vring, memory: &Arc<Memory>, durable: bool) {
        self.io.log_announced();
        let mut announced = std::mem::take(&mut self.announced);
        let mut writes = announced.drain(..);
        while let Some((head, Parsed { status_at, action })) = writes.next() {
            match &action {
                Action::Write { range, data } if self.write_now(*range, *data, durable) => {
                    self.answers.push(self.parser.answer(head, status_at, Status::Ok, 0));
                    self.none_at_once = false;
                    self.end_group_if_full(device, vring, writes.len());
                }
                _ => self.start(memory, head, status_at, action, durable),
            }
        }
        drop(writes);
        self.announced = announced;
    }

    /// Ends a group in the middle of a batch. The last one ends with the pass.
    fn end_group_if_full(&mut self, device: &Device, vring: &Vring, left: usize) {
        if left > 0 && self.answers.len() >= self.interrupts.group() {
            self.end_group(device, vring, left);
        }
    }

    fn write_now(&mut self, range: BlockRange, data: Data, durable: bool) -> bool {
        let view = self.parser.view(data);
        view.is_some_and(|view| self.io.write_now(range, view, durable))
    }

    /// Starts a request that cannot be done at once.
    fn start(
        &mut self,
        memory: &Arc<Memory>,
        head: u16,
        status_at: Option<GuestAddress>,
        action: Action,
        durable: bool,
    ) {
        let (parts, written) = match &action {
            Action::Read { range, data } => (parts_of(*range).count(), data.len),
            Action::Write { range, .. } => (parts_of(*range).count(), 0),
            Action::Discard(ranges) => (ranges.len(), 0),
            Action::WriteZeroes(ranges) => (ranges.len(), 0),
            Action::Flush | Action::Answer { .. } => (1, 0),
        };
        let buf = match &action {
            Action::Read { data, .. } | Action::Write { data, .. } => {
                self.parser.view(*data).map(|view| view.to_buf())
            }
            _ => None,
        };
        let token = status_at.and_then(|status_at| {
            self.slots.insert(Slot { head, parts: parts as u32, written, status_at, memory: memory.clone() })
        });
        let Some(token) = token else {
            // Not reached: there is room for all that is taken, and a status for all that is done.
            self.answers.push(self.parser.answer(head, status_at, Status::IoError, 0));
            return;
        };
        match (action, buf) {
            (Action::Read { range, .. }, Some(buf)) => {
                self.push_parts(token, range, buf, |range, buf| Request::Read { range, buf });
            }
            (Action::Write { range, .. }, Some(buf)) => {
                self.push_parts(token, range, buf, |range, buf| Request::Write { range, buf, durable });
            }
            (Action::Flush, _) => self.io.push(token, Request::Flush),
            (Action::Discard(ranges), _) => {
                for (part, range) in (0..).zip(ranges) {
                    self.io.push(part_token(token, part), Request::Discard { range });
                }
            }
            (Action::WriteZeroes(ranges), _) => {
                for (part, (range, may_unmap)) in (0..).zip(ranges) {
                    let request = Request::WriteZeroes { range, may_unmap, durable };
                    self.io.push(part_token(token, part), request);
                }
            }
            // Not reached either: data of this batch has a view, and answers are given before.
            (Action::Read { .. } | Action::Write { .. } | Action::Answer { .. }, _) => {
                self.answers.extend(self.slots.finish(token, Outcome::Failed));
            }
        }
    }

    /// Starts a read or write in as many parts as it has.
    fn push_parts(
        &mut self,
        token: u64,
        range: BlockRange,
        buf: GuestBuf,
        request: impl Fn(BlockRange, GuestBuf) -> Request,
    ) {
        if parts_of(range).nth(1).is_none() {
            return self.io.push(token, request(range, buf));
        }
        for (part, inner) in (0..).zip(parts_of(range)) {
            let token = part_token(token, part);
            match buf.slice((inner.offset() - range.offset()) as usize, inner.len() as usize) {
                Some(buf) => self.io.push(token, request(inner, buf)),
                // Not reached: the buffer is as long as the range.
                None => self.answers.extend(self.slots.finish(token, Outcome::Failed)),
            }
        }
    }

    /// Turns finished disk requests into answers. Those that were left stay in the in-flight table, and the next
    /// server does them again. Without one, nobody knows which they are: the rings only tell how many were answered.
    fn collect(&mut self) {
        for Finished { token, outcome } in self.finished.drain(..) {
            let is_noted = self.inflight.is_some();
            let outcome = if is_noted { outcome } else { outcome.min(Outcome::Failed) };
            self.answers.extend(self.slots.finish(token, outcome));
        }
    }

    /// Publishes what is answered. If that can't be, because the ring's memory was taken away, it is tried again in the next
    /// pass: a change of memory wakes the worker. As nothing is taken meanwhile, no more answers wait than the queue has room
    /// for.
    fn publish(&mut self, device: &Device, vring: &Vring) {
        if self.answers.is_empty() {
            return;
        }
        let memory = device.memory();
        let mut state = vring.lock();
        let queue = state.get_queue_mut();
        let before = queue.next_used();
        let published = publish(queue, &memory, &self.answers);
        let next = queue.next_used();
        if let (Ok(()), Some(inflight)) = (&published, &self.inflight) {
            inflight.published(&self.answers, next);
        }
        drop(state);
        if let Err(error) = published {
            return device.warn(|| format!("cannot publish answers to the guest: {error}"));
        }
        self.answers.clear();
        self.interrupts.published(before, next);
    }

    /// Interrupts the guest, if it wants to be told of what was published.
    fn tell(&mut self, device: &Device, vring: &Vring) {
        let Some(before) = self.interrupts.take() else { return };
        let memory = device.memory();
        let state = vring.lock();
        let wanted = wants_interrupt(state.get_queue(), &memory, before).unwrap_or_else(|error| {
            device.warn(|| format!("cannot tell whether to interrupt the guest: {error}"));
            // One too many does no harm.
            true
        });
        if wanted && let Err(error) = vring.signal(&state) {
            device.warn(|| format!("cannot interrupt the guest: {error}"));
        }
    }

    /// Whether there is room for requests: here, and where what is not done at once goes.
    fn can_take(&self) -> bool {
        self.slots.is_empty() || !self.slots.is_full() && self.io.has_room()
    }

    /// Looks for work for as long as it pays, without the ring's lock. True: there is some.
    fn spin(&mut self, device: &Device, vring: &Vring) -> bool {
        let mut goes_on = self.poll.begins(Instant::now(), self.none_at_once && self.io.in_flight() > 0);
        if goes_on && std::mem::take(&mut self.armed) {
            self.disarm(device, vring);
        }
        while goes_on && vring.is_active() && !device.is_stopping() {
            for _ in 0..LOOKS_PER_TIME {
                if self.watch.as_ref().is_some_and(|watch| self.can_take() && watch.left() > 0) {
                    self.poll.found();
                    return true;
                }
                if self.io.in_flight() > 0 {
                    self.io.reap(&mut self.finished);
                    if !self.finished.is_empty() {
                        self.poll.found();
                        return true;
                    }
                }
                std::hint::spin_loop();
            }
            goes_on = self.poll.goes_on(Instant::now());
        }
        false
    }

    /// Asks the guest for no kick: one for what polling finds costs it time, and wakes us when we sleep the next time.
    fn disarm(&self, device: &Device, vring: &Vring) {
        let state = vring.lock();
        if state.is_enabled() && state.get_queue().ready() {
            // If it can't be asked, there is no ring to look at either.
            let _ = want_no_kick(state.get_queue(), &device.memory());
        }
    }

    /// Asks the guest for a kick. True: there was something already.
    fn arm(&mut self, device: &Device, vring: &Vring) -> bool {
        self.watch = None;
        if !self.can_take() {
            // Nothing can be taken before something is answered, and that will wake us.
            return false;
        }
        let memory = device.memory();
        let mut state = vring.lock();
        if !state.is_enabled() || !state.get_queue().ready() {
            return false;
        }
        self.armed = true;
        state.get_queue_mut().enable_notification(memory.as_ref()).unwrap_or(false)
    }
}

#[cfg(test)]
mod cost;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const SHAPE: Shape = Shape { queues: 2, queue_size: 4 };

fn table() -> Arc<InflightTable> {
    Arc::new(InflightTable::create(SHAPE).unwrap())
}

/// What the frontend does while we are dead: it keeps the memory.
fn survived(table: &Arc<InflightTable>) -> Arc<InflightTable> {
    let fd = table.as_fd().try_clone_to_owned().unwrap();
    Arc::new(InflightTable::adopt(fd, table.shape()).unwrap())
}

fn used(head: u16) -> Used {
    Used { head, len: 1 }
}

#[test]
fn table_that_comes_back_has_its_token_and_requests_in_the_order_they_were_taken() {
    let table = table();
    let mut queue = table.queue(1).unwrap();
    [1, 0, 3, 2].into_iter().for_each(|head| queue.popped(head));
    queue.published(&[used(0)], 1);
    let table = survived(&table);
    assert_eq!(table.token(), survived(&table).token());
    let mut queue = table.queue(1).unwrap();
    assert_eq!(queue.resume(4, 1, |_| None), [1, 3, 2]);
    queue.popped(0);
    assert_eq!(survived(&table).queue(1).unwrap().resume(4, 1, |_| None), [1, 3, 2, 0]);
    assert!(table.queue(0).unwrap().resume(4, 0, |_| None).is_empty());
    assert!(table.queue(2).is_none());
}

#[test]
fn table_of_a_ring_that_is_new_since_is_dropped() {
    let table = table();
    let mut queue = table.queue(0).unwrap();
    queue.published(&[], 300);
    queue.popped(1);
    assert!(queue.resume(4, 0, |_| panic!("the old ring is not there to be read")).is_empty());
    assert!(queue.resume(4, 0, |_| None).is_empty());
}

/// Invariant 8: whatever a frontend sends as a table, and whatever it writes into it.
#[test]
fn table_that_makes_no_sense_is_refused_or_harmless() {
    let table = table();
    let adopt = |shape| InflightTable::adopt(table.as_fd().try_clone_to_owned().unwrap(), shape);
    assert!(adopt(SHAPE).is_ok());
    for (queues, queue_size) in [(1, 4), (2, 8), (0, 0), (u16::MAX, u16::MAX)] {
        assert!(adopt(Shape { queues, queue_size }).is_err());
        assert_eq!(
            InflightTable::create(Shape { queues, queue_size }).is_ok(),
            queues == 1 || queue_size == 8
        );
    }
    let foreign = SharedMemory::create("foreign", 4096).unwrap();
    assert!(InflightTable::adopt(foreign.as_fd().try_clone_to_owned().unwrap(), SHAPE).is_err());
    for index in 5..table.memory.bytes() as usize / 8 {
        store(table.memory.word(index), u64::MAX - index as u64);
    }
    let mut queue = table.queue(0).unwrap();
    let heads = queue.resume(4, 7, |_| Some(u32::MAX));
    assert!(heads.len() <= 4 && heads.iter().all(|head| *head < 4));
    queue.popped(9);
    queue.published(&[used(9)], 8);
    queue.popped(0);
}

/// A ring, its guest, and a device that is killed at any step. A request is (head, version).
struct World {
    table: Arc<InflightTable>,
    queue: InflightQueue,
    avail: Vec<(u16, u32)>,
    used: Vec<(u16, u32)>,
    seen: usize,
    version: BTreeMap<u16, u32>,
    next_avail: usize,
    flying: Vec<(u16, u32)>,
    done: Vec<(u16, u32)>,
    /// Published; heads that are to be cleared, then the table's index.
    clearing: Option<Vec<u16>>,
}

const SIZE: u16 = 4;

impl World {
    fn new() -> Self {
        let table = table();
        Self {
            queue: table.queue(0).unwrap(),
            table,
            avail: Vec::new(),
            used: Vec::new(),
            seen: 0,
            version: BTreeMap::new(),
            next_avail: 0,
            flying: Vec::new(),
            done: Vec::new(),
            clearing: None,
        }
    }

    fn offer(&mut self, head: u16) {
        let version = self.version.entry(head).or_default();
        if *version == 0 || self.used[..self.seen].contains(&(head, *version)) {
            *version += 1;
            self.avail.push((head, *version));
        }
    }

    fn execute(&mut self, head: u16) {
        let request = (head, self.version[&head]);
        assert!(!self.used.contains(&request), "{request:?} is executed again after it was published");
        self.flying.push(request);
    }

    fn step(&mut self, choice: u8) {
        let pick = usize::from(choice >> 3);
        match (choice & 7, &mut self.clearing) {
            (0, _) => self.seen = self.used.len(),
            (1, _) => self.offer(pick as u16 % SIZE),
            (2, None) => {
                if let Some((head, _)) = self.avail.get(self.next_avail).copied() {
                    self.next_avail += 1;
                    self.queue.popped(head);
                    self.execute(head);
                }
            }
            (3, _) if !self.flying.is_empty() => {
                let request = self.flying.remove(pick % self.flying.len());
                self.done.push(request);
            }
            (4, None) if !self.done.is_empty() => {
                self.clearing = Some(self.done.iter().map(|(head, _)| *head).collect());
                self.used.append(&mut self.done);
            }
            (5, Some(heads)) => match heads.pop() {
                // `published` is these two, one after the other.
                Some(head) => store(self.queue.head(head), 0),
                None => {
                    self.queue.published(&[], self.used.len() as u16);
                    self.clearing = None;
                }
            },
            (6, _) => self.kill(),
            _ => {}
        }
    }

    fn kill(&mut self) {
        self.table = survived(&self.table);
        self.queue = self.table.queue(0).unwrap();
        (self.flying, self.done, self.clearing) = (Vec::new(), Vec::new(), None);
        let used = self.used.clone();
        let heads =
            self.queue.resume(SIZE, used.len() as u16, |index| Some(used[usize::from(index)].0.into()));
        self.next_avail = used.len() + heads.len();
        let taken: BTreeSet<_> = self.avail[..self.next_avail].iter().copied().collect();
        let waiting = taken.iter().filter(|request| !used.contains(request)).count();
        assert_eq!(waiting, heads.len(), "what was taken is published or executed again");
        heads.into_iter().for_each(|head| self.execute(head));
    }

    /// Everything that was offered completes, once.
    fn finish(mut self) {
        self.kill();
        for _ in 0..self.avail.len() * 20 {
            [2, 3, 4, 5, 5].into_iter().for_each(|choice| self.step(choice));
        }
        let used: BTreeSet<_> = self.used.iter().copied().collect();
        assert_eq!(used.len(), self.used.len(), "a request was published twice");
        assert_eq!(used, self.avail.iter().copied().collect(), "a request was lost");
    }
}

proptest! {
    /// Invariant 3: whenever the device is killed, each request is published exactly once, and is
    /// never executed after that.
    #[test]
    fn requests_of_a_device_that_is_killed_at_any_step_are_published_once(
        choices in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut world = World::new();
        choices.into_iter().for_each(|choice| world.step(choice));
        world.finish();
    }
}

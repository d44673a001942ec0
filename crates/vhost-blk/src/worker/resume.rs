//! What a queue's thread does when its ring starts and a server before has taken requests that it has not answered.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};

use super::Worker;
use crate::{
    backend::Device,
    chain::Table,
    request::Memory,
    used::{used_head, used_index},
};

impl Worker {
    /// A ring was started: finds out where to begin, and what was taken before and not answered, which is to be taken
    /// again (in-flight table, step 3). `None`: the ring is not in memory, as when the frontend is about to replace that; nothing is known
    /// yet.
    pub(super) fn resume(&mut self, device: &Device, queue: &mut Queue, memory: &Arc<Memory>) -> Option<()> {
        if !self.slots.is_empty() || !self.answers.is_empty() || !self.again.is_empty() {
            // Not a start: the kick of a running ring was replaced.
            return Some(());
        }
        self.inflight = device.inflight().and_then(|table| table.queue(self.index));
        let Some(inflight) = &mut self.inflight else { return Some(()) };
        let size = queue.size();
        if size > inflight.heads() {
            device.warn(|| format!("a queue of size {size} has an in-flight table of {}", inflight.heads()));
            self.inflight = None;
            return Some(());
        }
        if !Table::of(queue).is_in(memory) {
            return None;
        }
        let used = used_index(memory, queue.used_ring()).ok()?;
        let heads = inflight.resume(size, used, |index| used_head(memory, queue, index).ok());
        queue.set_next_used(used);
        queue.set_next_avail(used.wrapping_add(heads.len() as u16));
        if !heads.is_empty() {
            log::info!("queue {}: {} requests in flight are done again", self.index, heads.len());
        }
        self.again = heads.into();
        Some(())
    }

    /// Takes requests again that were taken before, as many as a batch should have; returns how many. By their heads: the available ring may
    /// have forgotten them.
    pub(super) fn take_again(&mut self, device: &Device, queue: &Queue) -> u32 {
        let table = Table::of(queue);
        let mut taken = 0;
        while !self.parser.is_full()
            && let Some(head) = self.again.pop_front()
        {
            let parsed = self.parser.parse(table, head, &device.disk, device.config.read_only);
            self.batch.push((head, parsed));
            taken += 1;
        }
        taken
    }
}

#[cfg(test)]
mod tests;

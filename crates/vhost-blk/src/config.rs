//! The device's face: feature bits and the configuration space (virtio 1.2, 5.2.3 and 5.2.4).

use vhost::vhost_user::message::{
    VHOST_USER_CONFIG_OFFSET, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1},
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::{cpus::Cpus, disk::DiskTraits, poll::Polling};

/// Most queues of a device.
pub const QUEUES_MAX: u16 = 16;
/// Most elements of a queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Size of the configuration space: up to and including `write_zeroes_may_unmap` and its padding.
pub(crate) const CONFIG_LEN: usize = 60;
/// Segments of one discard or write-zeroes request that are accepted.
pub(crate) const RANGE_SEGMENTS_MAX: u32 = 32;
/// Sectors of one such segment that are accepted: 16 MiB. It may become an operation per block.
pub(crate) const RANGE_SECTORS_MAX: u32 = (16 << 20) / 512;

/// Largest data segment that is asked of drivers, 256 KiB; longer ones are served all the same.
const SIZE_MAX: u32 = 256 << 10;
/// Bytes of a read or write that are accepted. Drivers need not heed the limits that they are told: UEFI firmware does not, and asks
/// for a boot loader or kernel image with one request, of as many bytes at most.
pub(crate) const DATA_MAX: u64 = 1 << 30;
/// A request of more bytes, a multiple of the block, goes to the disk in parts. What drivers make of the limits is one part.
pub(crate) const PART_MAX: u64 = 32 << 20;
const _: () = assert!(SIZE_MAX as u64 * SEG_MAX as u64 <= PART_MAX);
/// A batch takes no more requests when they have so many bytes: other things are looked at between batches.
pub(crate) const BATCH_BYTES_MAX: u64 = 2 * PART_MAX;
/// Data segments per request that are asked of drivers. A chain must not be longer than the queue,
/// whose size the frontend chooses (128 by default, in QEMU), so this is not made of our own limit.
const SEG_MAX: u16 = 126;
/// Block size that I/O should be aligned to, in bytes: the unit of the write log.
const PHYSICAL_BLOCK: u32 = 4096;
/// Offset of the byte `writeback`, the only one that a driver may write.
const WRITEBACK_AT: usize = 32;

/// How a device looks to a guest; fixed while a server runs.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Number of virtqueues, each with a worker thread: 1 to [`QUEUES_MAX`].
    pub num_queues: u16,
    /// Largest queue size that a frontend may choose: a power of two, at most [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// Refuse writes, discards and write-zeroes, and say so in the features.
    pub read_only: bool,
    /// How long to poll for more work before sleeping.
    pub polling: Polling,
    /// Processors that the thread of each queue may run on, by the queue's number. Where there is none,
    /// it may run where the process may.
    pub queue_cpus: Vec<Option<Cpus>>,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            num_queues: 1,
            queue_size: QUEUE_SIZE_MAX,
            read_only: false,
            polling: Polling::Auto,
            queue_cpus: Vec::new(),
        }
    }
}

impl DeviceConfig {
    /// Why the values can't be used, if so.
    pub(crate) fn problem(&self) -> Option<String> {
        if !(1..=QUEUES_MAX).contains(&self.num_queues) {
            Some(format!("the number of queues is {}, expected 1 to {QUEUES_MAX}", self.num_queues))
        } else if !self.queue_size.is_power_of_two() || !(2..=QUEUE_SIZE_MAX).contains(&self.queue_size) {
            Some(format!(
                "the queue size is {}, expected a power of two from 2 to {QUEUE_SIZE_MAX}",
                self.queue_size
            ))
        } else {
            None
        }
    }
}

/// The virtio feature bits that are offered.
pub(crate) fn features(device: &DeviceConfig, disk: &DiskTraits) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        // QEMU offers it over its legacy interface whatever we say, and a guest that takes it would be turned away.
        VIRTIO_F_ANY_LAYOUT,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    if device.read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend(disk.discard.then_some(VIRTIO_BLK_F_DISCARD));
        bits.extend(disk.write_zeroes.then_some(VIRTIO_BLK_F_WRITE_ZEROES));
    }
    bits.iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
}

/// The vhost-user protocol features that are offered. INFLIGHT_SHMFD is the relay's: the library can't
/// answer its messages. Not STATUS (the library closes the
/// connection on its message), not LOG_SHMFD (a migrated guest would wake up on a pristine disk).
pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// Whether a write must be durable before it is acknowledged: the guest has negotiated no cache
/// it could flush, or has switched it off (virtio 1.2, 5.2.6.2).
pub(crate) fn is_write_through(acked_features: u64, writeback: bool) -> bool {
    let acked = |bit: u32| acked_features >> bit & 1 == 1;
    if acked(VIRTIO_BLK_F_CONFIG_WCE) { !writeback } else { !acked(VIRTIO_BLK_F_FLUSH) }
}

/// The whole configuration space.
fn space(device: &DeviceConfig, disk: &DiskTraits, writeback: bool) -> [u8; CONFIG_LEN] {
    let capacity = disk.geometry.sectors();
    // Cylinders, heads and sectors that nobody uses, as other devices make them up.
    let (heads, sectors) = (16u8, 63u8);
    let cylinders = u16::try_from(capacity / 1008).unwrap_or(u16::MAX);
    let block = disk.logical_block_size.clamp(512, PHYSICAL_BLOCK);
    let per_physical = PHYSICAL_BLOCK / block;
    let seg_max = SEG_MAX.min(device.queue_size.saturating_sub(2)).max(1);
    let fields: [&[u8]; 20] = [
        &capacity.to_le_bytes(),
        &SIZE_MAX.to_le_bytes(),
        &u32::from(seg_max).to_le_bytes(),
        &cylinders.to_le_bytes(),
        &[heads],
        &[sectors],
        &block.to_le_bytes(),
        &[per_physical.ilog2() as u8],         // physical_block_exp
        &[0],                                  // alignment_offset
        &(per_physical as u16).to_le_bytes(),  // min_io_size, in logical blocks
        &0u32.to_le_bytes(),                   // opt_io_size
        &[u8::from(writeback)],                // writeback
        &[0],                                  // unused
        &device.num_queues.to_le_bytes(),      // num_queues
        &RANGE_SECTORS_MAX.to_le_bytes(),      // max_discard_sectors
        &RANGE_SEGMENTS_MAX.to_le_bytes(),     // max_discard_seg
        &(PHYSICAL_BLOCK / 512).to_le_bytes(), // discard_sector_alignment
        &RANGE_SECTORS_MAX.to_le_bytes(),      // max_write_zeroes_sectors
        &RANGE_SEGMENTS_MAX.to_le_bytes(),     // max_write_zeroes_seg
        &[1, 0, 0, 0],                         // write_zeroes_may_unmap, unused
    ];
    let mut bytes = [0; CONFIG_LEN];
    for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    bytes
}

/// The answer to GET_CONFIG: exactly `size` bytes from `offset` on, zeros where there is nothing.
/// QEMU counts from 0, Cloud Hypervisor from 0x100.
pub(crate) fn read(
    device: &DeviceConfig,
    disk: &DiskTraits,
    writeback: bool,
    offset: u32,
    size: u32,
) -> Vec<u8> {
    let space = space(device, disk, writeback);
    let from = space.get(relative(offset)..).unwrap_or_default();
    // The library has checked that offset and size are at most 4096.
    from.iter().copied().chain(std::iter::repeat(0)).take(size.min(4096) as usize).collect()
}

/// What SET_CONFIG of `bytes` at `offset` makes of `writeback`, if it touches it. All other bytes
/// are read-only; writing them has no effect.
pub(crate) fn written_writeback(offset: u32, bytes: &[u8]) -> Option<bool> {
    let at = WRITEBACK_AT.checked_sub(relative(offset))?;
    bytes.get(at).map(|byte| *byte != 0)
}

fn relative(offset: u32) -> usize {
    offset.checked_sub(VHOST_USER_CONFIG_OFFSET).unwrap_or(offset) as usize
}

#[cfg(test)]
mod tests {
    use blocks::Geometry;
    use proptest::prelude::*;

    use super::*;

    fn disk() -> DiskTraits {
        DiskTraits {
            geometry: Geometry::new(64 << 20).unwrap(),
            serial: [0; 20],
            logical_block_size: 512,
            discard: true,
            write_zeroes: true,
        }
    }

    #[test]
    fn config_of_a_device_has_each_field_in_its_place() {
        let device = DeviceConfig { num_queues: 4, ..DeviceConfig::default() };
        let config = read(&device, &disk(), true, 0, 60);
        let u16_at = |at: usize| u16::from_le_bytes(config[at..at + 2].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 131_072);
        assert_eq!((u32_at(8), u32_at(12)), (SIZE_MAX, 126));
        assert_eq!((u32_at(20), config[24], u16_at(26)), (512, 3, 8));
        assert_eq!((config[32], u16_at(34)), (1, 4));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (RANGE_SECTORS_MAX, RANGE_SEGMENTS_MAX, 8));
        assert_eq!((u32_at(48), u32_at(52), config[56]), (RANGE_SECTORS_MAX, RANGE_SEGMENTS_MAX, 1));
    }

    #[test]
    fn config_asked_from_cloud_hypervisors_offset_is_the_same() {
        let device = DeviceConfig::default();
        assert_eq!(read(&device, &disk(), true, 0x100, 60), read(&device, &disk(), true, 0, 60));
        assert_eq!(written_writeback(0x120, &[0]), Some(false));
    }

    #[test]
    fn set_config_changes_writeback_only() {
        assert_eq!(written_writeback(32, &[0]), Some(false));
        assert_eq!(written_writeback(32, &[1]), Some(true));
        assert_eq!(written_writeback(0, &[0; 60]), Some(false));
        assert_eq!(written_writeback(0, &[9; 32]), None);
        assert_eq!(written_writeback(33, &[1; 27]), None);
        assert_eq!(written_writeback(32, &[]), None);
    }

    #[test]
    fn features_of_a_read_only_device_offer_no_way_to_write() {
        let device = DeviceConfig { read_only: true, ..DeviceConfig::default() };
        let bits = features(&device, &disk());
        assert_eq!(bits >> VIRTIO_BLK_F_RO & 1, 1);
        assert_eq!((bits >> VIRTIO_BLK_F_DISCARD & 1, bits >> VIRTIO_BLK_F_WRITE_ZEROES & 1), (0, 0));
    }

    #[test]
    fn features_follow_what_the_disk_can_do() {
        let bits = features(&DeviceConfig::default(), &DiskTraits { discard: false, ..disk() });
        assert_eq!((bits >> VIRTIO_BLK_F_DISCARD & 1, bits >> VIRTIO_BLK_F_WRITE_ZEROES & 1), (0, 1));
        assert_eq!(bits >> VIRTIO_BLK_F_RO & 1, 0);
        assert_eq!(bits & VhostUserVirtioFeatures::LOG_ALL.bits(), 0);
        assert_eq!(bits >> VIRTIO_F_ANY_LAYOUT & 1, 1);
    }

    #[test]
    fn write_through_follows_negotiation_then_the_guests_switch() {
        let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
        assert!(is_write_through(0, true));
        assert!(!is_write_through(flush, false));
        assert!(is_write_through(flush | wce, false));
        assert!(!is_write_through(flush | wce, true));
    }

    #[test]
    fn device_config_out_of_bounds_is_a_problem() {
        let good = DeviceConfig::default();
        assert!(good.problem().is_none());
        for (num_queues, queue_size) in [(0, 128), (17, 128), (1, 0), (1, 1), (1, 100), (1, 2048)] {
            assert!(DeviceConfig { num_queues, queue_size, ..good.clone() }.problem().is_some());
        }
    }

    proptest! {
        #[test]
        fn config_asked_for_any_range_has_the_asked_length(offset in 0u32..5000, size in 0u32..4096) {
            let answer = read(&DeviceConfig::default(), &disk(), true, offset, size);
            prop_assert_eq!(answer.len(), size as usize);
        }
    }
}

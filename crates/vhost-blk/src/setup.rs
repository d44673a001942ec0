//! What a frontend has set up over its connection, so that another server can be told the same and
//! go on with it: the last message of each kind, for each ring or memory region.

use std::collections::{BTreeMap, VecDeque};

use vhost::vhost_user::message::FrontendReq;

use crate::{config::QUEUES_MAX, regions::REGIONS_MAX, wire::Message};

/// Payload bits of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR that are the number of the ring.
const RING_MASK: u32 = 0xff;

/// The kinds of messages that set something up, in the order in which to say them again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Owner,
    /// Asked for, not set: but the library answers REPLY_ACK only after it has offered its features.
    Offer,
    ProtocolFeatures,
    Features,
    MemoryTable,
    MemoryRegion,
    Inflight,
    Config,
    RingSize,
    RingAddresses,
    RingBase,
    RingCall,
    RingError,
    RingKick,
    RingEnable,
}

/// The messages.
#[derive(Debug, Default)]
pub(crate) struct Setup {
    messages: BTreeMap<(Kind, u64), Message>,
    /// Something could not be remembered.
    incomplete: bool,
}

impl Setup {
    /// Takes note of a request of the frontend.
    pub(crate) fn note(&mut self, message: &Message) {
        let ring = u64::from(message.payload_word(0));
        let ring_and_flags = u64::from(message.payload_word(0) & RING_MASK);
        let region = u64::from(message.payload_word(3)) << 32 | u64::from(message.payload_word(2));
        let (kind, index) = match FrontendReq::try_from(message.request()) {
            Ok(FrontendReq::SET_OWNER) => (Kind::Owner, 0),
            Ok(FrontendReq::GET_FEATURES) => (Kind::Offer, 0),
            Ok(FrontendReq::SET_PROTOCOL_FEATURES) => (Kind::ProtocolFeatures, 0),
            Ok(FrontendReq::SET_FEATURES) => (Kind::Features, 0),
            Ok(FrontendReq::SET_MEM_TABLE) => {
                self.messages.retain(|(kind, _), _| *kind != Kind::MemoryRegion);
                (Kind::MemoryTable, 0)
            }
            Ok(FrontendReq::ADD_MEM_REG) => (Kind::MemoryRegion, region),
            Ok(FrontendReq::REM_MEM_REG) => {
                // Of a region that came in the table nothing is known: the table can't be said again.
                self.incomplete |= self.messages.remove(&(Kind::MemoryRegion, region)).is_none();
                return;
            }
            Ok(FrontendReq::SET_INFLIGHT_FD) => (Kind::Inflight, 0),
            Ok(FrontendReq::SET_CONFIG) => (Kind::Config, 0),
            Ok(FrontendReq::SET_VRING_NUM) => (Kind::RingSize, ring),
            Ok(FrontendReq::SET_VRING_ADDR) => (Kind::RingAddresses, ring),
            Ok(FrontendReq::SET_VRING_BASE) => (Kind::RingBase, ring),
            Ok(FrontendReq::SET_VRING_CALL) => (Kind::RingCall, ring_and_flags),
            Ok(FrontendReq::SET_VRING_ERR) => (Kind::RingError, ring_and_flags),
            Ok(FrontendReq::SET_VRING_KICK) => (Kind::RingKick, ring_and_flags),
            Ok(FrontendReq::SET_VRING_ENABLE) => (Kind::RingEnable, ring),
            Ok(FrontendReq::GET_VRING_BASE) => {
                for kind in [Kind::RingKick, Kind::RingCall] {
                    self.messages.remove(&(kind, ring));
                }
                return;
            }
            Ok(FrontendReq::RESET_DEVICE | FrontendReq::RESET_OWNER) => {
                self.messages.retain(|(kind, _), _| *kind < Kind::RingSize);
                return;
            }
            _ => return,
        };
        let regions = self.messages.keys().filter(|(kind, _)| *kind == Kind::MemoryRegion).count();
        let possible = match kind {
            Kind::MemoryRegion => regions < REGIONS_MAX as usize,
            kind if kind >= Kind::RingSize => index < u64::from(QUEUES_MAX),
            _ => true,
        };
        match message.to_say_again() {
            Ok(again) if possible => {
                self.messages.insert((kind, index), again);
            }
            _ => self.incomplete = true,
        }
    }

    /// The messages in the order in which to say them; `None` if something is missing.
    pub(crate) fn into_messages(self) -> Option<VecDeque<Message>> {
        (!self.incomplete).then(|| self.messages.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: FrontendReq, payload: &[u32]) -> Message {
        let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Message::reply(request as u32, &payload, Vec::new())
    }

    fn requests(setup: Setup) -> Vec<(u32, u32)> {
        let messages = setup.into_messages().unwrap();
        messages.iter().map(|message| (message.request(), message.payload_word(0))).collect()
    }

    #[test]
    fn setup_is_said_again_in_order_with_the_last_of_each_kind() {
        let mut setup = Setup::default();
        let ring = |request, ring, value| message(request, &[ring, value]);
        setup.note(&ring(FrontendReq::SET_VRING_NUM, 1, 128));
        setup.note(&ring(FrontendReq::SET_VRING_NUM, 0, 64));
        setup.note(&ring(FrontendReq::SET_VRING_KICK, 0x100, 0));
        setup.note(&message(FrontendReq::SET_FEATURES, &[7, 0]));
        setup.note(&message(FrontendReq::SET_OWNER, &[]));
        setup.note(&message(FrontendReq::GET_FEATURES, &[]));
        setup.note(&message(FrontendReq::SET_FEATURES, &[9, 0]));
        setup.note(&ring(FrontendReq::SET_VRING_ENABLE, 0, 1));
        let expected = [
            (FrontendReq::SET_OWNER, 0),
            (FrontendReq::GET_FEATURES, 0),
            (FrontendReq::SET_FEATURES, 9),
            (FrontendReq::SET_VRING_NUM, 0),
            (FrontendReq::SET_VRING_NUM, 1),
            (FrontendReq::SET_VRING_KICK, 0x100),
            (FrontendReq::SET_VRING_ENABLE, 0),
        ];
        assert_eq!(requests(setup), expected.map(|(request, word)| (request as u32, word)));
    }

    #[test]
    fn setup_forgets_what_was_taken_back() {
        let mut setup = Setup::default();
        let region = |request, address| message(request, &[0, 0, address, 0, 0x1000, 0]);
        setup.note(&region(FrontendReq::ADD_MEM_REG, 0x1000));
        setup.note(&region(FrontendReq::ADD_MEM_REG, 0x2000));
        setup.note(&region(FrontendReq::REM_MEM_REG, 0x1000));
        setup.note(&message(FrontendReq::SET_VRING_KICK, &[3, 0]));
        setup.note(&message(FrontendReq::SET_VRING_BASE, &[3, 0]));
        setup.note(&message(FrontendReq::GET_VRING_BASE, &[3, 0]));
        let expected = [FrontendReq::ADD_MEM_REG as u32, FrontendReq::SET_VRING_BASE as u32];
        assert_eq!(requests(setup).iter().map(|(request, _)| *request).collect::<Vec<_>>(), expected);
    }

    /// Invariant 8: what can't be remembered is not guessed, and a frontend can't make it grow.
    #[test]
    fn setup_that_is_impossible_is_not_said_again() {
        let mut setup = Setup::default();
        setup.note(&message(FrontendReq::SET_VRING_NUM, &[u32::from(QUEUES_MAX), 64]));
        assert!(setup.into_messages().is_none());
        let mut setup = Setup::default();
        setup.note(&message(FrontendReq::SET_MEM_TABLE, &[1, 0]));
        setup.note(&message(FrontendReq::REM_MEM_REG, &[0, 0, 0x1000, 0]));
        assert!(setup.into_messages().is_none());
        let mut setup = Setup::default();
        for address in 0..2 * REGIONS_MAX {
            setup.note(&message(FrontendReq::ADD_MEM_REG, &[0, 0, address, 0]));
        }
        assert_eq!(setup.messages.len(), REGIONS_MAX as usize);
        assert!(setup.into_messages().is_none());
    }
}

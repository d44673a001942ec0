//! Keeping sessions' changes: a disk that is not reset, for a while.
//!
//! What is pending elsewhere is kept here: blocks that may differ from the base, which are the disk's
//! content and are read from it. The manifest says for all its logs which of the two they mean, so what
//! recovery concludes, the worst included, is kept as well as it would be restored. The two never meet:
//! a session whose changes are kept begins only when nothing is pending.

use blocks::BlockSet;

use super::SessionDisk;
use crate::manifest::Manifest;
use crate::recover::{Basis, Distrust};
use crate::{DiskOptions, Error};

/// What becomes of sessions' changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Changes {
    /// They are restored. A disk that has kept ones is refused.
    #[default]
    Reset,
    /// They are kept.
    Keep,
    /// What is kept stays so: for those who begin no session.
    AsBefore,
    /// They are restored, those included that were kept.
    GiveUp,
}

/// Says what of the blocks that were `found` to differ is pending, and what is kept. `goes_on`: there
/// is an open session besides, in which more are. `basis`: how it was found.
///
/// # Errors
/// If changes are kept that `options` does not want, or of which nobody knows what of them came later: a state that is
/// older than the disk tells nothing of sessions since, whose changes were not to be kept.
pub(super) fn divide(
    manifest: &mut Manifest,
    found: BlockSet,
    goes_on: bool,
    basis: &Basis,
    options: &DiskOptions,
) -> Result<(BlockSet, BlockSet), Error> {
    let none = BlockSet::new(found.bound());
    if found.is_empty() && !goes_on {
        manifest.kept = false;
    }
    match options.changes {
        _ if !manifest.kept => Ok((found, none)),
        Changes::Keep | Changes::AsBefore if *basis == Basis::Everything(Distrust::OlderState) => {
            Err(Error::KeptUnknown { disk: options.disk.clone() })
        }
        Changes::Keep | Changes::AsBefore => Ok((none, found)),
        Changes::Reset => Err(Error::Kept { disk: options.disk.clone() }),
        Changes::GiveUp => {
            manifest.kept = false;
            Ok((found, none))
        }
    }
}

impl SessionDisk {
    /// Whether sessions' changes are kept from now on, or were before.
    pub fn keeps_changes(&self) -> bool {
        self.changes == Changes::Keep || self.lifecycle().manifest.kept
    }

    /// Blocks that earlier sessions changed and that are kept.
    pub fn kept_blocks(&self) -> u64 {
        self.lifecycle().kept.count()
    }

    /// Marks the manifest of a session that begins as one of kept changes, if they are to be.
    pub(super) fn keep_in(&self, manifest: &mut Manifest) -> Result<(), Error> {
        if self.changes != Changes::Keep {
            return Ok(());
        }
        if !self.shared.pending.is_empty() {
            return Err(Error::Refused(format!(
                "{}: {} blocks of earlier sessions are being restored; changes can only be kept after that",
                self.paths.disk().display(),
                self.shared.pending.count()
            )));
        }
        manifest.kept = true;
        Ok(())
    }
}

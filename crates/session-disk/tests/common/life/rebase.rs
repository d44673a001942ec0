//! A disk that is moved to another generation of its base between two servers.

use std::sync::atomic::AtomicBool;

use session_disk::{DiskOptions, Error, RebaseOptions, Rebased, SessionDisk, rebase};

use super::{Generation, Life, Session};

impl Life<'_> {
    /// Moves the disk to another base while nobody serves it.
    pub(super) fn rebase(&mut self, to: usize, after_kill: bool) {
        let count = self.generations.len();
        let Some(to) = self.generations.get(to % count.max(1)) else { return };
        let was_open = self.session.is_some();
        if after_kill {
            self.die(&[], None);
            self.counts.kills += 1;
            self.close_chapter();
            let ended = self.session.take().map(Session::known);
            if was_open {
                // Its VM might come back. It is over when somebody has taken the disk over without it.
                assert!(matches!(self.try_rebase(to), Err(Error::Refused(_) | Error::Held { .. })));
                let options = DiskOptions { resume: false, ..self.options.clone() };
                if SessionDisk::open(&options).unwrap().held().is_some() {
                    self.kept = ended;
                }
            }
        } else {
            self.end();
            self.quiet_stop();
        }
        match self.try_rebase(to) {
            Ok(_) => {
                assert!(self.kept.is_none());
                self.base = &to.image;
                self.counts.rebases += 1;
            }
            Err(error) => assert!(matches!(error, Error::Held { .. }), "{error:?}"),
        }
        self.reopen(false, false);
    }

    fn try_rebase(&self, to: &Generation) -> Result<Rebased, Error> {
        let wanted = RebaseOptions::new(&to.path, self.options.clone());
        rebase(&wanted, &AtomicBool::new(false), &mut |_| ())
    }
}

//! A base as it lies on its medium: what a disk on the same file system shares instead of copying it.

use std::sync::{Arc, Mutex};

use blockio::{Engine, File, FileIndex, FileKind};

use super::BaseImage;
use crate::engine::BaseEngine;
use crate::error::BaseError;
use crate::pool::{Pool, Source, Urgency};
use crate::seal::{CHUNK_SIZE, Verified};
use crate::store::Store;

impl BaseImage {
    /// The file whose blocks a disk may share, since byte `n` of it is byte `n` of the base; and up to where it may: of a
    /// sealed base only whole chunks.
    pub fn shareable(&self) -> Option<(&Arc<File>, u64)> {
        let Store::Raw(file, _) = &*self.store else { return None };
        let end = if self.verified.is_some() { self.size / CHUNK_SIZE * CHUNK_SIZE } else { self.size };
        (file.kind() == FileKind::Regular).then_some((file, end))
    }

    /// An engine that reads a sealed base as its file `medium`, compared with the seal like all that is read of
    /// it, but past the page cache; all else is for `inner`. What is to be shared is read so before: what is
    /// in the page cache may be good while the block that it once came from is not.
    ///
    /// # Errors
    /// If the base is not sealed or can't be shared, or if its file system can't read past the page cache.
    pub fn medium_engine(
        &self,
        inner: Box<dyn Engine>,
        medium: FileIndex,
        urgency: Urgency,
    ) -> Result<Box<dyn Engine>, BaseError> {
        let refused = |what: &str| BaseError::Refused { path: self.path().to_owned(), what: what.to_owned() };
        let (file, _) = self.shareable().ok_or_else(|| refused("it is not a raw file"))?;
        let verified = self.verified.as_ref().ok_or_else(|| refused("it is not sealed"))?;
        let store = Store::Raw(Arc::new(file.reopen_direct()?), Mutex::default());
        let verified = Verified::new(Arc::new(store), Arc::clone(verified.seal()));
        let pool = Pool::new(Arc::new(verified) as Arc<dyn Source>);
        let engine = BaseEngine::new(inner, medium, Arc::new(pool), urgency);
        engine.map(|engine| Box::new(engine) as Box<dyn Engine>).map_err(|source| BaseError::Read {
            path: self.path().to_owned(),
            offset: 0,
            source,
        })
    }
}

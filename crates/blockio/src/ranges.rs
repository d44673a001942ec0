//! Where a sparse file has data, asked again and again.

use std::ops::Range;

use crate::{Error, File};

/// Remembers what a file system said last of a file's data.
///
/// To ask for every range is dear: on tmpfs the search for the next hole walks through all data before
/// it, so a walk over many small ranges of a dense file would cost the square of its size.
#[derive(Debug, Default)]
pub struct DataRanges {
    /// `data` is the first data at or after this offset.
    from: u64,
    data: Range<u64>,
}

impl DataRanges {
    /// As [`File::next_data`], of always the same file, which must not change meanwhile.
    ///
    /// # Errors
    /// As there.
    pub fn next(&mut self, file: &File, from: u64) -> Result<Option<Range<u64>>, Error> {
        if self.from > from || from >= self.data.end {
            match file.next_data(from)? {
                None => return Ok(None),
                Some(data) => *self = Self { from, data },
            }
        }
        Ok(Some(from.max(self.data.start)..self.data.end))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::OpenOptions;

    #[test]
    fn ranges_asked_for_in_any_order_are_the_files() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(1 << 20).unwrap();
        for block in [3, 4, 100, 200] {
            named.as_file().write_all_at(&[1; 4096], block * 4096).unwrap();
        }
        let file = File::open(named.path(), OpenOptions::default()).unwrap();
        let mut ranges = DataRanges::default();
        for block in (0..260).chain((0..260).rev()).chain([150, 3, 199, 4, 0]) {
            let offset = block * 4096;
            assert_eq!(ranges.next(&file, offset).unwrap(), file.next_data(offset).unwrap(), "{block}");
        }
    }
}

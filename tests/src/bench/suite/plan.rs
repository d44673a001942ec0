//! What is measured, how long, and where.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::time::Duration;

use super::Medium;
use crate::bench::points::Point;
use crate::client::Pattern;

const MEDIA: [&str; 3] = ["tmpfs", "disk", "direct"];
const GROUPS: [&str; 4] = ["rate", "first", "restore", "idle"];

/// What was asked for: media, groups and points. Nothing: everything.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    media: Vec<String>,
    groups: Vec<String>,
    points: Vec<Point>,
}

impl Wanted {
    /// Adds a word of the command line.
    ///
    /// # Errors
    /// It is none of them; the message says what there is.
    pub fn add(&mut self, word: &str) -> Result<(), String> {
        if MEDIA.contains(&word) {
            self.media.push(word.to_owned());
        } else if GROUPS.contains(&word) {
            self.groups.push(word.to_owned());
        } else {
            let all = [MEDIA.join(", "), GROUPS.join(", ")].join(", ");
            self.points.push(word.parse().map_err(|error| format!("{error}. Or one of {all}"))?);
        }
        Ok(())
    }

    /// Whether everything is wanted.
    pub fn everything(&self) -> bool {
        self.media.is_empty() && self.groups.is_empty() && self.points.is_empty()
    }

    pub(super) fn group(&self, name: &str) -> bool {
        self.everything() || self.groups.iter().any(|group| group == name)
    }

    /// The points to measure on a medium.
    pub(super) fn points(&self, medium: &str) -> Vec<Point> {
        let wanted = match (&self.media[..], &self.points[..]) {
            ([], []) => self.everything(),
            ([], _) => true,
            (media, _) => media.iter().any(|wanted| wanted == medium),
        };
        match (wanted, &self.points[..]) {
            (false, _) => Vec::new(),
            (true, []) => all_points(),
            (true, points) => points.to_vec(),
        }
    }
}

/// The points that are measured if none are named.
fn all_points() -> Vec<Point> {
    let mut points = Vec::new();
    for pattern in [Pattern::RandomRead, Pattern::RandomWrite, Pattern::Mix] {
        points.extend([1, 32, 128].map(|depth| Point::one_queue(pattern, depth)));
    }
    points.extend([Pattern::SequentialRead, Pattern::SequentialWrite].map(|it| Point::one_queue(it, 16)));
    let two = |pattern, depth| Point { pattern, depth, queues: 2 };
    points.extend([two(Pattern::RandomRead, 32), two(Pattern::Mix, 32), two(Pattern::SequentialRead, 16)]);
    points
}

/// What is measured, how long, and where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What.
    pub wanted: Wanted,
    /// A directory on a tmpfs, for disks and for what servers keep in memory.
    pub tmpfs: PathBuf,
    /// A directory on a disk.
    pub disk: PathBuf,
    /// How long one measurement of a rate counts, without its warm-up.
    pub time: Duration,
    /// How often all is measured in turn.
    pub rounds: usize,
    /// Bytes of the disks whose rates are measured.
    pub size: u64,
    /// Bytes of the disks for first writes to every block, and to a block of each cluster.
    pub first_sizes: [u64; 2],
    /// Bytes of the disk that is restored, and how many of them a session has written.
    pub restore_size: u64,
    /// Bytes that a session has written before a restore, in scattered blocks.
    pub restore_dirty: u64,
    /// Disks that are served and idle at a time.
    pub disks: Vec<usize>,
    /// How long they are watched.
    pub idle: Duration,
}

impl Plan {
    /// The set whose figures count.
    pub fn full(tmpfs: PathBuf, disk: PathBuf) -> Self {
        Self {
            wanted: Wanted::default(),
            tmpfs,
            disk,
            time: Duration::from_millis(800),
            rounds: 3,
            size: 512 << 20,
            first_sizes: [256 << 20, 1 << 30],
            restore_size: 4 << 30,
            restore_dirty: 1 << 30,
            disks: vec![1, 10, 100],
            idle: Duration::from_secs(10),
        }
    }

    /// The same, in a few minutes: one round, smaller disks.
    pub fn quick(tmpfs: PathBuf, disk: PathBuf) -> Self {
        Self {
            time: Duration::from_millis(300),
            rounds: 1,
            size: 256 << 20,
            first_sizes: [64 << 20, 256 << 20],
            restore_size: 1 << 30,
            restore_dirty: 128 << 20,
            disks: vec![1, 10],
            idle: Duration::from_secs(3),
            ..Self::full(tmpfs, disk)
        }
    }

    /// A trial of everything: no figure means anything.
    pub fn trial(tmpfs: PathBuf, disk: PathBuf) -> Self {
        Self {
            time: Duration::from_millis(20),
            rounds: 1,
            size: 8 << 20,
            first_sizes: [1 << 20, 4 << 20],
            restore_size: 16 << 20,
            restore_dirty: 1 << 20,
            disks: vec![1, 2],
            idle: Duration::from_millis(100),
            ..Self::full(tmpfs, disk)
        }
    }

    pub(super) fn media(&self) -> [Medium; 3] {
        let [tmpfs, disk, direct] = MEDIA;
        [
            Medium { name: tmpfs, dir: self.tmpfs.clone(), direct: false },
            Medium { name: disk, dir: self.disk.clone(), direct: false },
            Medium { name: direct, dir: self.disk.clone(), direct: true },
        ]
    }

    /// Panics if there is not enough room for the disks.
    pub(super) fn check_room(&self) {
        // Base, session disk, peer's disk, two overlays.
        let rates = self.size.max(self.first_sizes[1]) * 5;
        // Base, session disk, copy.
        let restored = if self.wanted.group("restore") { self.restore_size * 3 } else { 0 };
        for (dir, need) in [(&self.tmpfs, rates), (&self.disk, rates.max(restored))] {
            let stat = rustix::fs::statvfs(dir).unwrap();
            let free = stat.f_bavail * stat.f_frsize;
            assert!(
                free > need,
                "{}: {} MiB are free, {} MiB are needed",
                dir.display(),
                free >> 20,
                need >> 20
            );
        }
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "medians of {} interleaved rounds of {} s; disks of {} MiB (rates), {} and {} MiB (first writes), {} MiB \
             (restore)",
            self.rounds,
            self.time.as_secs_f64(),
            self.size >> 20,
            self.first_sizes[0] >> 20,
            self.first_sizes[1] >> 20,
            self.restore_size >> 20,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_words_select_media_groups_and_points() {
        let wanted = |words: &[&str]| {
            let mut wanted = Wanted::default();
            words.iter().for_each(|word| wanted.add(word).unwrap());
            wanted
        };
        assert!(wanted(&[]).group("idle") && wanted(&[]).points("disk").len() > 10);
        let some = wanted(&["tmpfs", "randread-1"]);
        assert_eq!(some.points("tmpfs").len(), 1);
        assert!(some.points("disk").is_empty() && !some.group("idle"));
        assert_eq!(wanted(&["mix-32"]).points("direct").len(), 1);
        assert!(wanted(&["idle"]).points("tmpfs").is_empty());
        assert!(Wanted::default().add("nothing").is_err());
    }
}

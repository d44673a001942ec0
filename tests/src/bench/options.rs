//! What the benchmarks understand on their command lines.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use crate::program::scratch_root;

/// What all of them understand.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--size MIB`: bytes of the disk.
    pub size: u64,
    /// `--seconds S`: how long a measurement takes.
    pub seconds: f64,
    /// `--rounds N`: how often all is measured in turn.
    pub rounds: usize,
    /// `--dir DIR`, more than once if wished: where the disks are.
    pub dirs: Vec<PathBuf>,
}

impl Options {
    /// The words of the command line; `self` has what they leave out. What is not understood here is
    /// given to `more`, which may take the word's value and says whether it understands it. Without a
    /// `--dir` the directories are `/dev/shm` and the target directory's `scratch`.
    pub fn parsed(mut self, words: Vec<String>, mut more: impl FnMut(&str, &mut Values) -> bool) -> Self {
        let mut words = Values::new(words);
        while let Some(word) = words.word() {
            match word.as_str() {
                "--size" => self.size = words.parsed::<u64>() << 20,
                "--seconds" => self.seconds = words.parsed(),
                "--rounds" => self.rounds = words.parsed(),
                "--dir" => self.dirs.push(words.value().into()),
                "--bench" => {} // cargo's own
                word if more(word, &mut words) => {}
                word => refuse(&format!("unknown option {word}")),
            }
        }
        if self.dirs.is_empty() {
            self.dirs = vec![PathBuf::from("/dev/shm"), scratch_root()];
        }
        self
    }
}

/// The words that are still to come.
#[derive(Debug)]
pub struct Values {
    words: std::vec::IntoIter<String>,
    last: String,
}

impl Values {
    /// The words of a command line.
    pub fn new(words: Vec<String>) -> Self {
        Self { words: words.into_iter(), last: String::new() }
    }

    /// The next word.
    pub fn word(&mut self) -> Option<String> {
        let word = self.words.next()?;
        self.last.clone_from(&word);
        Some(word)
    }

    /// The value of the option at hand.
    pub fn value(&mut self) -> String {
        self.words.next().unwrap_or_else(|| refuse(&format!("{} needs a value", self.last)))
    }

    /// The value of the option at hand, as a number or the like.
    pub fn parsed<T: FromStr<Err: Display>>(&mut self) -> T {
        parse(&self.value())
    }

    /// The value of the option at hand: several, with commas between.
    pub fn list<T: FromStr<Err: Display>>(&mut self) -> Vec<T> {
        self.value().split(',').map(parse).collect()
    }
}

fn parse<T: FromStr<Err: Display>>(word: &str) -> T {
    word.parse().unwrap_or_else(|error| refuse(&format!("{word}: {error}")))
}

/// Ends the program because of how it was called.
pub fn refuse(why: &str) -> ! {
    eprintln!("{why}");
    std::process::exit(2)
}

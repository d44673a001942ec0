//! Writes the fixtures into the directory that is named. `tests/fixtures.rs` compares them.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a tool for tests")]

use std::{env, fs, path::PathBuf};

#[path = "../tests/support/mod.rs"]
mod support;

fn main() {
    let dir = PathBuf::from(env::args_os().nth(1).unwrap_or_else(|| "fixtures".into()));
    for fixture in support::fixtures::all() {
        fs::write(dir.join(fixture.name), &fixture.bytes).unwrap();
        println!("{} {:?}", fixture.name, fixture.mark);
    }
}

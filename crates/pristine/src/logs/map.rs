//! `pristine log show --map`: where sessions wrote.

use std::io::{self, IsTerminal};
use std::path::Path;

use blocks::BlockSet;

use super::picture::{Map, svg, text};
use super::{LogShowArgs, blocks, print, read, show};
use crate::failure::Failure;

/// How wide a picture is where there is no terminal.
const WIDTH: usize = 80;

pub(super) fn run(args: &LogShowArgs) -> Result<(), Failure> {
    let (mut all, mut title): (Option<(BlockSet, u64)>, _) = (None, String::new());
    let logs = args.source.logs(false)?;
    for path in &logs {
        let contents = read(path)?;
        let (set, size) = (blocks(&contents), contents.header.geometry.size());
        title = format!("{} {}", show::kind(&contents), contents.header.id.seq);
        match &all {
            None => all = Some((set, size)),
            Some((union, of)) if *of == size => union.insert_set(&set),
            Some((_, of)) => {
                return Err(Failure::usage(format!(
                    "{} is of a disk of {size} bytes, and the log before it of one of {of}: a picture is of disks of one size",
                    path.display()
                )));
            }
        }
    }
    let Some((set, size)) = all else { return Err(Failure::usage("no log was named")) };
    let layout = args.source.layout()?;
    if logs.len() > 1 {
        title = format!("{} logs", logs.len());
    }
    if let Some(disk) = &args.source.disk {
        title = format!("{title} of {}", disk.file_name().unwrap_or(disk.as_os_str()).to_string_lossy());
    }
    let map = Map::new(title, size, set.runs().collect(), &layout);
    match &args.svg {
        None => print(|out| out.write_all(text::render(&map, width()).as_bytes())).map(drop),
        Some(path) => {
            let picture = svg::render(&map);
            replace(path, picture.as_bytes())
                .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))?;
            say!("{}: {}", path.display(), map.summary());
            Ok(())
        }
    }
}

/// Columns of the terminal.
fn width() -> usize {
    let out = io::stdout();
    if !out.is_terminal() {
        return WIDTH;
    }
    rustix::termios::tcgetwinsize(&out).map_or(WIDTH, |size| usize::from(size.ws_col))
}

/// Puts a file at `path`, in the place of what is there: whole, or not at all.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let write = || {
        std::fs::write(&new, bytes)?;
        std::fs::rename(&new, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&new);
    })
}

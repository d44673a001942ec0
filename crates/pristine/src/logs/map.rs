//! `pristine log show --map`: where sessions wrote.

use std::fs;
use std::io::{self, IsTerminal, Read, Seek, Write};
use std::os::unix::fs::FileTypeExt;
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
            let is_file = put(path, picture.as_bytes())
                .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))?;
            if is_file {
                say!("{}: {}", path.display(), map.summary());
            }
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

/// How each picture begins.
const PICTURE: &[u8] = b"<svg ";

/// Puts a picture at `path`: in the place of another one, whole or not at all. A pipe, a terminal and what a link leads to are
/// written into, which may be our output. Whether it is in a file of its own.
///
/// # Errors
/// Also if there is something else: it is somebody's, and is lost if it is replaced.
fn put(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => replace(path, bytes).map(|()| true),
        Ok(found) if found.is_file() => {
            check_picture(&fs::File::open(path)?)?;
            replace(path, bytes).map(|()| true)
        }
        _ => write_into(path, bytes).map(|()| false),
    }
}

fn write_into(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_dir() || kind.is_block_device() {
        return Err(no_picture());
    }
    let mut file = fs::OpenOptions::new().read(kind.is_file()).write(true).open(path)?;
    if kind.is_file() {
        check_picture(&file)?;
        file.set_len(0)?;
        file.rewind()?;
    }
    file.write_all(bytes)
}

/// Fails unless the file is empty or begins as a picture does.
fn check_picture(file: &fs::File) -> io::Result<()> {
    let mut head = Vec::new();
    file.take(PICTURE.len() as u64).read_to_end(&mut head)?;
    if PICTURE.starts_with(&head) { Ok(()) } else { Err(no_picture()) }
}

fn no_picture() -> io::Error {
    let what =
        "what is there is no picture, and is not replaced; name another file, or remove this one first";
    io::Error::new(io::ErrorKind::AlreadyExists, what)
}

/// Makes the file under another name first, which nobody may have taken.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let mut file = fs::File::create_new(&new)?;
    let written = file.write_all(bytes).and_then(|()| fs::rename(&new, path));
    written.inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

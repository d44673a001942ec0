//! `base list`: the generations in a directory, as a tree.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use base_image::{Listed, Listing, list_generations};
use blocks::BLOCK_SIZE;
use clap::Args;
use indicatif::BinaryBytes;

use crate::commands::{text, texts};
use crate::failure::Failure;

/// Digits of a root hash that tell generations apart for a human.
const ROOT_SHOWN: usize = 12;

#[derive(Debug, Args)]
pub(crate) struct BaseListArgs {
    /// The directory in which the bases are
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &BaseListArgs) -> Result<ExitCode, Failure> {
    let listing = list_generations(&args.dir).map_err(|error| Failure::of(&error))?;
    if args.json {
        say!("{}", report(&args.dir, &listing));
        return Ok(ExitCode::SUCCESS);
    }
    if listing.generations.is_empty() {
        say!("{}: no sealed base; `pristine base seal BASE` makes one", args.dir.display());
    } else {
        table(&listing).iter().for_each(|line| say!("{line}"));
    }
    for listed in &listing.generations {
        for trouble in &listed.troubles {
            say!("warning  {}: {trouble}", listed.path.display());
        }
    }
    for (path, why) in &listing.unreadable {
        say!("warning  {}: {why}", path.display());
    }
    for path in &listing.half_made {
        let again = "made by a `pristine promote` that runs or was interrupted; the next one to that name replaces it";
        say!("warning  {}: half-made, {again}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A hash, as much of it as a human compares.
fn short(root: &impl ToString) -> String {
    root.to_string().chars().take(ROOT_SHOWN).collect()
}

/// The lines of the table.
fn table(listing: &Listing) -> Vec<String> {
    let row = |listed: &Listed, depth: usize| -> [String; 7] {
        let name = file_name(&listed.path);
        let indented = match depth {
            0 => name,
            depth => format!("{}└ {name}", "  ".repeat(depth - 1)),
        };
        let (parent, changed) = listed.parent.map_or_else(Default::default, |parent| {
            (short(&parent.root), BinaryBytes(parent.blocks * BLOCK_SIZE).to_string())
        });
        [
            indented,
            listed.format.to_string(),
            BinaryBytes(listed.generation.size).to_string(),
            listed.allocated.map_or_else(|| "missing".into(), |bytes| BinaryBytes(bytes).to_string()),
            short(&listed.generation.root),
            parent,
            changed,
        ]
    };
    let head = ["BASE", "FORMAT", "SIZE", "ALLOCATED", "ROOT", "PARENT", "CHANGED"].map(str::to_owned);
    let rows = listing.tree().into_iter();
    let rows = rows.filter_map(|node| Some(row(listing.generations.get(node.index)?, node.depth)));
    let rows: Vec<[String; 7]> = std::iter::once(head).chain(rows).collect();
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; 7]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn report(dir: &Path, listing: &Listing) -> serde_json::Value {
    let generations = listing.tree().into_iter().filter_map(|node| {
        let listed = listing.generations.get(node.index)?;
        let parent = listing.parent_of(node.index).and_then(|index| listing.generations.get(index));
        Some(serde_json::json!({
            "base": text(&listed.path),
            "format": listed.format,
            "size": listed.generation.size,
            "allocated_bytes": listed.allocated,
            "root": listed.generation.root,
            "parent_root": listed.parent.map(|parent| parent.root),
            "parent": parent.map(|parent| text(&parent.path)),
            "depth": node.depth,
            "changed_blocks": listed.parent.map(|parent| parent.blocks),
            "changed_extents": listed.parent.map(|parent| parent.extents),
            "troubles": listed.troubles,
        }))
    });
    let unreadable =
        listing.unreadable.iter().map(|(path, why)| serde_json::json!({ "base": text(path), "why": why }));
    serde_json::json!({
        "dir": text(dir),
        "block_size": BLOCK_SIZE,
        "generations": generations.collect::<Vec<_>>(),
        "half_made": texts(&listing.half_made),
        "unreadable": unreadable.collect::<Vec<_>>(),
    })
}

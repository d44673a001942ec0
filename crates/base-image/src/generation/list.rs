//! Which generations there are in a directory: found by their manifests, joined by their deltas.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockio::in_full;

use super::half_made_name;
use crate::delta::{Delta, Generation};
use crate::error::BaseError;
use crate::format::BaseFormat;
use crate::seal::{Root, Seal};

const MANIFEST: &str = ".manifest";

/// Where a generation comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The parent's root hash.
    pub root: Root,
    /// Blocks in which the two differ.
    pub blocks: u64,
    /// Extents that they are in.
    pub extents: usize,
}

/// A sealed image.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: BaseFormat,
    /// What it is.
    pub generation: Generation,
    /// Bytes that it takes up in its file system, those included that it shares; `None`: it is not there.
    pub allocated: Option<u64>,
    /// Where it comes from, if its delta says so.
    pub parent: Option<Parent>,
    /// What is wrong with it, as sentences.
    pub troubles: Vec<String>,
}

/// What there is in a directory.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Images with a seal that can be read, by name.
    pub generations: Vec<Listed>,
    /// Half-made ones, of promotions that run or were interrupted.
    pub half_made: Vec<PathBuf>,
    /// Manifests that can't be read, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// A place in the tree of generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// The generation: its place in the listing.
    pub index: usize,
    /// How many of its ancestors are listed.
    pub depth: usize,
}

/// Looks for sealed images in `dir`, and not below it. What they hold is not looked at.
///
/// # Errors
/// If the directory can't be read.
pub fn list(dir: &Path) -> Result<Listing, BaseError> {
    let failed = |error| BaseError::manifest("read directory", dir, error);
    let mut listing = Listing::default();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if half_made_name(&name).is_some() {
            listing.half_made.push(dir.join(&name));
            continue;
        }
        let Some(text) = name.to_str() else {
            if name.as_encoded_bytes().ends_with(MANIFEST.as_bytes()) {
                listing
                    .unreadable
                    .push((dir.join(&name), "its name is no UTF-8, rename it and its image".into()));
            }
            continue;
        };
        let Some(image) = text.strip_suffix(MANIFEST) else { continue };
        if half_made_name(image.as_ref()).is_some() {
            continue;
        }
        let path = dir.join(image);
        match Seal::glance(&path) {
            Ok(Some((generation, format))) => listing.generations.push(look_at(path, generation, format)),
            Ok(None) => {}
            Err(error) => listing.unreadable.push((path, in_full(&error))),
        }
    }
    // The names of what a promotion had made when it was interrupted say nothing.
    let half_made = |path: &Path| listing.half_made.iter().any(|half| half.with_extension("") == path);
    listing.generations.retain(|listed| listed.allocated.is_some() || !half_made(&listed.path));
    listing.generations.sort_by(|a, b| a.path.cmp(&b.path));
    listing.half_made.sort();
    Ok(listing)
}

fn look_at(path: PathBuf, generation: Generation, format: BaseFormat) -> Listed {
    let allocated = fs::metadata(&path).ok().map(|metadata| metadata.blocks() * 512);
    let mut troubles = Vec::new();
    if allocated.is_none() {
        troubles.push("it is not there, only its manifest is".to_owned());
    }
    let parent = match Delta::of(&path) {
        Ok(None) => None,
        Ok(Some(delta)) if delta.child().root == generation.root => {
            Some(Parent { root: delta.parent().root, blocks: delta.blocks(), extents: delta.extents().len() })
        }
        Ok(Some(_)) => {
            troubles.push("its delta is of another image: it was sealed again since it was made".to_owned());
            None
        }
        Err(error) => {
            troubles.push(in_full(&error));
            None
        }
    };
    Listed { path, format, generation, allocated, parent, troubles }
}

impl Listing {
    /// The place of the generation's parent, if it is listed too.
    pub fn parent_of(&self, index: usize) -> Option<usize> {
        let root = self.generations.get(index)?.parent?.root;
        self.generations.iter().position(|listed| listed.generation.root == root).filter(|at| *at != index)
    }

    /// All generations, each after its parent; children of one parent by their names.
    pub fn tree(&self) -> Vec<Node> {
        let mut children: HashMap<Option<usize>, Vec<usize>> = HashMap::new();
        for index in 0..self.generations.len() {
            children.entry(self.parent_of(index)).or_default().push(index);
        }
        let mut nodes: Vec<Node> = Vec::new();
        let mut seen = vec![false; self.generations.len()];
        let firsts = children.get(&None).cloned().unwrap_or_default();
        // Deltas that were made up can go round in a circle: whoever is not reached is listed all the same.
        for first in firsts.into_iter().chain(0..self.generations.len()) {
            let mut next = vec![Node { index: first, depth: 0 }];
            while let Some(node) = next.pop() {
                match seen.get_mut(node.index) {
                    Some(seen) if !*seen => *seen = true,
                    _ => continue,
                }
                nodes.push(node);
                let below = children.get(&Some(node.index)).into_iter().flatten().rev();
                next.extend(below.map(|index| Node { index: *index, depth: node.depth + 1 }));
            }
        }
        nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(parents: &[(u8, Option<u8>)]) -> Listing {
        let root = |byte: u8| Root::from_bytes([byte; 32]);
        let generations = parents.iter().map(|(own, parent)| Listed {
            path: PathBuf::from(format!("g{own}")),
            format: BaseFormat::Raw,
            generation: Generation { root: root(*own), size: 512 },
            allocated: Some(0),
            parent: parent.map(|parent| Parent { root: root(parent), blocks: 1, extents: 1 }),
            troubles: Vec::new(),
        });
        Listing { generations: generations.collect(), ..Listing::default() }
    }

    fn tree(parents: &[(u8, Option<u8>)]) -> Vec<(usize, usize)> {
        listing(parents).tree().iter().map(|node| (node.index, node.depth)).collect()
    }

    #[test]
    fn tree_has_each_generation_once_after_its_parent() {
        let found = tree(&[(1, None), (2, Some(1)), (3, Some(2)), (4, Some(1)), (5, Some(99))]);
        assert_eq!(found, [(0, 0), (1, 1), (2, 2), (3, 1), (4, 0)]);
    }

    /// Who is to mend it is told what is wrong, down to the cause.
    #[test]
    fn manifest_and_delta_that_can_not_be_opened_are_told_of_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("golden.raw.manifest")).unwrap();
        let listing = list(dir.path()).unwrap();
        let [(path, why)] = listing.unreadable.as_slice() else { panic!("{listing:?}") };
        assert_eq!(path, &dir.path().join("golden.raw"));
        assert!(why.contains("golden.raw.manifest") && why.contains("regular file"), "{why}");
        fs::create_dir(dir.path().join("other.raw.delta")).unwrap();
        let other = look_at(
            dir.path().join("other.raw"),
            Generation { root: Root::from_bytes([1; 32]), size: 512 },
            BaseFormat::Raw,
        );
        assert!(other.troubles.iter().any(|trouble| trouble.contains("other.raw.delta")), "{other:?}");
    }

    #[test]
    fn tree_of_deltas_in_a_circle_ends() {
        assert_eq!(tree(&[(1, Some(2)), (2, Some(1)), (3, Some(3))]), [(2, 0), (0, 0), (1, 1)]);
    }
}

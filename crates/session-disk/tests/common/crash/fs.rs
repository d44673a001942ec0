//! A file system in memory that knows what is durable.
//!
//! Of what was written and not synced a power cut keeps any part, in sectors of 512 bytes; of lengths,
//! new names, renames and removals any of those that no sync covers. A sync covers what had ended
//! before it began.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::random::Random;
use super::recorder::{Change, Event};

pub(crate) type Sector = Option<Arc<[u8; 512]>>;

/// Bytes of a file; sectors that are not there are zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    pub(crate) len: u64,
    pub(crate) sectors: BTreeMap<u64, Arc<[u8; 512]>>,
}

#[derive(Clone, Debug)]
enum DataChange {
    Sectors(Vec<(u64, Sector)>),
    Length(u64),
}

impl Content {
    fn apply(&mut self, change: &DataChange) {
        match change {
            DataChange::Sectors(sectors) => {
                for (sector, bytes) in sectors {
                    match bytes {
                        Some(bytes) => self.sectors.insert(*sector, Arc::clone(bytes)),
                        None => self.sectors.remove(sector),
                    };
                }
            }
            DataChange::Length(len) => {
                if *len < self.len {
                    self.sectors.split_off(&len.div_ceil(512));
                }
                self.len = *len;
            }
        }
    }

    /// All bytes; for small files.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        for (sector, content) in &self.sectors {
            let at = *sector as usize * 512;
            let end = bytes.len().min(at + 512);
            if at < end {
                bytes[at..end].copy_from_slice(&content[..end - at]);
            }
        }
        bytes
    }
}

/// A change that no sync has covered.
#[derive(Clone, Debug)]
struct Pending<T> {
    id: u64,
    ended: bool,
    /// Durable when it has ended.
    durable: bool,
    change: T,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    durable: Content,
    pending: Vec<Pending<DataChange>>,
    /// As all who look see it.
    now: Content,
    /// Sectors that were ever written.
    touched: BTreeSet<u64>,
}

impl Inode {
    fn push(&mut self, id: u64, durable: bool, change: DataChange) {
        self.now.apply(&change);
        self.pending.push(Pending { id, ended: false, durable, change });
    }

    fn rebuild(&mut self) {
        self.now = self.durable.clone();
        self.pending.iter().for_each(|pending| self.now.apply(&pending.change));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir,
    File(usize),
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(PathBuf, Node),
    Rename(PathBuf, PathBuf, Node),
    Remove(PathBuf),
}

impl NameChange {
    fn dir(&self) -> &Path {
        match self {
            Self::Set(path, _) | Self::Rename(path, ..) | Self::Remove(path) => path.parent().unwrap(),
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            Self::Set(path, node) => {
                names.insert(path.clone(), *node);
            }
            Self::Rename(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

/// What has begun and not ended.
#[derive(Clone, Debug)]
enum Open {
    /// Changes, by their IDs.
    Changes(Vec<u64>),
    /// A sync of an inode, and the changes that it covers.
    Sync(usize, Vec<u64>),
    /// A sync of names, and the changes that it covers.
    SyncNames(Vec<u64>),
}

/// The file system.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fs {
    inodes: Vec<Inode>,
    durable_names: BTreeMap<PathBuf, Node>,
    pending_names: Vec<Pending<NameChange>>,
    names: BTreeMap<PathBuf, Node>,
    open: HashMap<usize, Open>,
    next_id: u64,
}

impl Fs {
    /// Goes on by one event, whose place is `number`.
    pub(crate) fn step(&mut self, number: usize, event: &Event) {
        match event {
            Event::Begin(path, change) => {
                let open = self.begin(path, change);
                self.open.insert(number, open);
            }
            Event::End(begin) => {
                if let Some(open) = self.open.remove(begin) {
                    self.end(open);
                }
            }
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn file(&self, path: &Path) -> usize {
        match self.names.get(path) {
            Some(Node::File(inode)) => *inode,
            other => panic!("{} is {other:?}", path.display()),
        }
    }

    fn name(&mut self, change: NameChange) -> Open {
        let id = self.id();
        change.apply(&mut self.names);
        self.pending_names.push(Pending { id, ended: false, durable: false, change });
        Open::Changes(vec![id])
    }

    fn data(&mut self, inode: usize, durable: bool, change: DataChange) -> u64 {
        let id = self.id();
        self.inodes[inode].push(id, durable, change);
        id
    }

    fn begin(&mut self, path: &Path, change: &Change) -> Open {
        match change {
            Change::Write { offset, bytes, durable } => self.write(path, *offset, bytes, *durable),
            Change::Zero { offset, len } => {
                let inode = self.file(path);
                assert!(offset % 512 == 0 && len % 512 == 0);
                let range = offset / 512..(offset + len) / 512;
                let sectors = self.inodes[inode].touched.range(range).map(|sector| (*sector, None)).collect();
                Open::Changes(vec![self.data(inode, false, DataChange::Sectors(sectors))])
            }
            Change::Create { len } => {
                let mut ids = Vec::new();
                let inode = match self.names.get(path) {
                    Some(Node::File(inode)) => {
                        let inode = *inode;
                        ids.push(self.data(inode, false, DataChange::Length(0)));
                        inode
                    }
                    _ => {
                        self.inodes.push(Inode::default());
                        let inode = self.inodes.len() - 1;
                        if let Open::Changes(id) =
                            self.name(NameChange::Set(path.to_owned(), Node::File(inode)))
                        {
                            ids.extend(id);
                        }
                        inode
                    }
                };
                ids.push(self.data(inode, false, DataChange::Length(*len)));
                Open::Changes(ids)
            }
            Change::Reserve { len } => {
                let inode = self.file(path);
                Open::Changes(vec![self.data(inode, false, DataChange::Length(*len))])
            }
            Change::CreateDir => self.name(NameChange::Set(path.to_owned(), Node::Dir)),
            Change::Rename { to } => {
                let node = Node::File(self.file(path));
                self.name(NameChange::Rename(path.to_owned(), to.clone(), node))
            }
            Change::Remove => self.name(NameChange::Remove(path.to_owned())),
            Change::Sync => {
                let inode = self.file(path);
                let ended = self.inodes[inode].pending.iter().filter(|p| p.ended).map(|p| p.id).collect();
                Open::Sync(inode, ended)
            }
            Change::SyncDir => {
                let here = self.pending_names.iter().filter(|p| p.ended && p.change.dir() == path);
                Open::SyncNames(here.map(|p| p.id).collect())
            }
        }
    }

    fn write(&mut self, path: &Path, offset: u64, bytes: &[u8], durable: bool) -> Open {
        let inode = self.file(path);
        let end = offset + bytes.len() as u64;
        let mut sectors = Vec::new();
        for sector in offset / 512..end.div_ceil(512) {
            // A write of a part of a sector leaves the rest of it, as it is now.
            let of_file = &self.inodes[inode];
            let mut content = of_file.now.sectors.get(&sector).map_or([0; 512], |bytes| **bytes);
            let (from, to) = (offset.max(sector * 512), end.min(sector * 512 + 512));
            content[(from - sector * 512) as usize..(to - sector * 512) as usize]
                .copy_from_slice(&bytes[(from - offset) as usize..(to - offset) as usize]);
            let is_zero = content.iter().all(|byte| *byte == 0);
            if !is_zero || of_file.touched.contains(&sector) {
                sectors.push((sector, (!is_zero).then(|| Arc::new(content))));
            }
        }
        self.inodes[inode].touched.extend(sectors.iter().map(|(sector, _)| *sector));
        let mut ids = vec![self.data(inode, durable, DataChange::Sectors(sectors))];
        if end > self.inodes[inode].now.len {
            ids.push(self.data(inode, durable, DataChange::Length(end)));
        }
        Open::Changes(ids)
    }

    fn end(&mut self, open: Open) {
        match open {
            Open::Changes(ids) => {
                for inode in &mut self.inodes {
                    for pending in inode.pending.iter_mut().filter(|p| ids.contains(&p.id)) {
                        pending.ended = true;
                    }
                    settle_durable(inode);
                }
                self.pending_names.iter_mut().filter(|p| ids.contains(&p.id)).for_each(|p| p.ended = true);
            }
            Open::Sync(inode, ids) => {
                let Inode { durable, pending, .. } = &mut self.inodes[inode];
                pending.retain(|p| {
                    let covered = ids.contains(&p.id);
                    if covered {
                        durable.apply(&p.change);
                    }
                    !covered
                });
            }
            Open::SyncNames(ids) => {
                let names = &mut self.durable_names;
                self.pending_names.retain(|p| {
                    let covered = ids.contains(&p.id);
                    if covered {
                        p.change.apply(names);
                    }
                    !covered
                });
            }
        }
    }

    /// What a kill leaves: all that has ended, and of what was in flight any part. Nothing more is durable.
    pub(crate) fn killed(&self, random: &mut Random) -> Self {
        let mut fs = self.clone();
        fs.open.clear();
        for inode in &mut fs.inodes {
            for pending in inode.pending.iter_mut().filter(|p| !p.ended) {
                let share = *random.pick(&[0, 0, 100, 100, 50]);
                keep_part(&mut pending.change, share, random);
                pending.ended = true;
                pending.durable = false;
            }
            inode.rebuild();
        }
        fs.pending_names.retain_mut(|pending| {
            let kept = pending.ended || random.chance(50);
            pending.ended = true;
            kept
        });
        fs.names = fs.durable_names.clone();
        fs.pending_names.iter().for_each(|pending| pending.change.apply(&mut fs.names));
        fs
    }

    /// What a power cut leaves: all that is durable, and any part of the rest. All of it is durable then.
    pub(crate) fn power_cut(&self, random: &mut Random) -> Self {
        let mut fs = self.clone();
        fs.open.clear();
        // At times a whole file's cache was written back, or none of it.
        for inode in &mut fs.inodes {
            let share = *random.pick(&[0, 0, 10, 50, 90, 100, 100]);
            for mut pending in inode.pending.drain(..) {
                keep_part(&mut pending.change, share, random);
                inode.durable.apply(&pending.change);
            }
            inode.rebuild();
        }
        let share = *random.pick(&[0, 30, 70, 100]);
        for pending in fs.pending_names.drain(..) {
            if random.chance(share) {
                pending.change.apply(&mut fs.durable_names);
            }
        }
        fs.names = fs.durable_names.clone();
        fs
    }

    /// Directories and files as all who look see them; parents come before their entries. What lies in a
    /// directory that is not there is not there.
    pub(crate) fn entries(&self) -> Vec<(&Path, Option<&Content>)> {
        let reachable = |path: &Path| {
            path.ancestors()
                .skip(1)
                .filter(|dir| *dir != Path::new(""))
                .all(|dir| self.names.contains_key(dir))
        };
        let content = |node: &Node| match node {
            Node::Dir => None,
            Node::File(inode) => Some(&self.inodes[*inode].now),
        };
        self.names
            .iter()
            .filter(|(path, _)| reachable(path))
            .map(|(path, node)| (path.as_path(), content(node)))
            .collect()
    }

    /// The file at `path` as all who look see it.
    pub(crate) fn content(&self, path: &Path) -> Option<&Content> {
        self.entries().into_iter().find(|(entry, _)| *entry == path)?.1
    }
}

/// Keeps `share` percent of a change.
fn keep_part(change: &mut DataChange, share: u64, random: &mut Random) {
    match change {
        DataChange::Sectors(sectors) => sectors.retain(|_| random.chance(share)),
        DataChange::Length(_) if !random.chance(share) => *change = DataChange::Sectors(Vec::new()),
        DataChange::Length(_) => {}
    }
}

/// Moves what was written durably and has ended to what is durable; what had been written to the same
/// sectors before can't come back.
fn settle_durable(inode: &mut Inode) {
    while let Some(index) = inode.pending.iter().position(|p| p.durable && p.ended) {
        let done = inode.pending.remove(index);
        inode.durable.apply(&done.change);
        if let DataChange::Sectors(written) = &done.change {
            let written: BTreeSet<u64> = written.iter().map(|(sector, _)| *sector).collect();
            for earlier in inode.pending.iter_mut().take(index) {
                if let DataChange::Sectors(sectors) = &mut earlier.change {
                    sectors.retain(|(sector, _)| !written.contains(sector));
                }
            }
        }
    }
}

//! The way from one generation to another along links between two of them each. No I/O.

/// Two generations, in no order, and how many blocks may differ between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link<N> {
    pub(super) ends: [N; 2],
    pub(super) blocks: u64,
}

impl<N: Copy + PartialEq> Link<N> {
    /// The other end, if `node` is one of them.
    fn from(&self, node: N) -> Option<N> {
        match self.ends {
            [here, there] | [there, here] if here == node => Some(there),
            _ => None,
        }
    }
}

/// A node that was reached.
struct Reached<N> {
    node: N,
    /// Blocks of all links on the way to it.
    cost: u64,
    /// The last link and the node before it, by their places.
    by: Option<(usize, usize)>,
    /// Whether there is no cheaper way to it.
    settled: bool,
}

/// The links that lead from `from` to `to` with the fewest blocks, by their places in `links`, from `from` on; `None` if
/// none do. Links lead in both directions.
pub(super) fn cheapest<N: Copy + PartialEq>(links: &[Link<N>], from: N, to: N) -> Option<Vec<usize>> {
    let mut reached = vec![Reached { node: from, cost: 0, by: None, settled: false }];
    loop {
        let open = reached.iter().enumerate().filter(|(_, place)| !place.settled);
        let (here, place) = open.min_by_key(|(_, place)| place.cost)?;
        let (node, cost) = (place.node, place.cost);
        if node == to {
            return Some(walk_back(&reached, here));
        }
        if let Some(place) = reached.get_mut(here) {
            place.settled = true;
        }
        for (number, link) in links.iter().enumerate() {
            let Some(next) = link.from(node) else { continue };
            let found = Reached {
                node: next,
                cost: cost.saturating_add(link.blocks),
                by: Some((number, here)),
                settled: false,
            };
            match reached.iter_mut().find(|place| place.node == next) {
                Some(known) if known.settled || known.cost <= found.cost => {}
                Some(known) => *known = found,
                None => reached.push(found),
            }
        }
    }
}

fn walk_back<N>(reached: &[Reached<N>], mut at: usize) -> Vec<usize> {
    let mut links = Vec::new();
    while let Some((link, before)) = reached.get(at).and_then(|place| place.by) {
        links.push(link);
        at = before;
    }
    links.reverse();
    links
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(one: u8, other: u8, blocks: u64) -> Link<u8> {
        Link { ends: [one, other], blocks }
    }

    #[test]
    fn way_along_a_chain_is_found_in_both_directions() {
        let links = [link(2, 3, 5), link(1, 2, 7), link(8, 9, 0)];
        assert_eq!(cheapest(&links, 1, 3), Some(vec![1, 0]));
        assert_eq!(cheapest(&links, 3, 1), Some(vec![0, 1]));
        assert_eq!(cheapest(&links, 1, 1), Some(vec![]));
        assert_eq!(cheapest(&links, 1, 9), None);
        assert_eq!(cheapest(&links, 1, 77), None);
        assert_eq!(cheapest::<u8>(&[], 1, 2), None);
    }

    /// Siblings are reached over their parent, and a shorter way is taken where there is one.
    #[test]
    fn way_with_the_fewest_blocks_is_taken() {
        let links = [link(1, 2, 10), link(1, 3, 10), link(2, 3, 100), link(3, 4, u64::MAX), link(4, 2, 1)];
        assert_eq!(cheapest(&links, 2, 3), Some(vec![0, 1]));
        assert_eq!(cheapest(&links, 3, 4), Some(vec![1, 0, 4]));
    }

    proptest! {
        /// What differs between two images differs in one of the links between them, whichever way is taken: so the
        /// union of their blocks holds it. And no way is cheaper than the one that was taken.
        #[test]
        fn union_along_the_way_holds_all_that_differs(
            images in prop::collection::vec(prop::collection::vec(0_u8..3, 12), 2..7),
            pairs in prop::collection::vec((0_usize..7, 0_usize..7, any::<u16>()), 0..14),
            from in 0_usize..7, to in 0_usize..7,
        ) {
            let count = images.len();
            let (from, to) = (from % count, to % count);
            // Each link holds what differs, and at times more.
            let sets: Vec<(usize, usize, Vec<bool>)> = pairs
                .into_iter()
                .map(|(a, b, more)| {
                    let (a, b) = (a % count, b % count);
                    let differs = (0..12).map(|block| images[a][block] != images[b][block] || more >> block & 5 == 5);
                    (a, b, differs.collect())
                })
                .collect();
            let blocks = |set: &[bool]| set.iter().filter(|differs| **differs).count() as u64;
            let links: Vec<Link<usize>> =
                sets.iter().map(|(a, b, set)| Link { ends: [*a, *b], blocks: blocks(set) }).collect();
            let way = cheapest(&links, from, to);
            // The cheapest costs, found the slow way.
            let mut costs = vec![u64::MAX; count];
            costs[from] = 0;
            for _ in 0..count {
                for link in &links {
                    let [a, b] = link.ends;
                    costs[a] = costs[a].min(costs[b].saturating_add(link.blocks));
                    costs[b] = costs[b].min(costs[a].saturating_add(link.blocks));
                }
            }
            prop_assert_eq!(way.is_some(), costs[to] != u64::MAX);
            let Some(way) = way else { return Ok(()) };
            let mut here = from;
            for number in &way {
                here = links[*number].from(here).unwrap();
            }
            prop_assert_eq!(here, to);
            prop_assert_eq!(way.iter().map(|number| links[*number].blocks).sum::<u64>(), costs[to]);
            let contents = images[from].iter().zip(&images[to]);
            for (block, _) in contents.enumerate().filter(|(_, (one, other))| one != other) {
                prop_assert!(way.iter().any(|number| sets[*number].2[block]), "block {}", block);
            }
        }
    }
}

//! Which processors the queues' threads run on, as the command line says it.

use std::str::FromStr;

use vhost_blk::{Cpus, QUEUES_MAX};

use crate::failure::Failure;

/// Processors of single queues: `0@[0,2],1@[3-5]`, with or without brackets around, as Cloud Hypervisor
/// has it for its own disks (`queue_affinity`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QueueAffinity(Vec<(usize, Cpus)>);

impl FromStr for QueueAffinity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        let inner = inner.strip_suffix(']').ok_or(EXPECTED)?;
        let mut queues: Vec<(usize, Cpus)> = Vec::new();
        for part in inner.split("],") {
            let (queue, cpus) = part.split_once("@[").ok_or(EXPECTED)?;
            let queue = queue.parse().map_err(|_| EXPECTED)?;
            if queues.iter().any(|(other, _)| *other == queue) {
                return Err(format!("queue {queue} is named twice"));
            }
            queues.push((queue, cpus.parse()?));
        }
        Ok(Self(queues))
    }
}

const EXPECTED: &str = "expected QUEUE@[CPUS],..., such as 0@[0,2],1@[1,3-5]";

/// The processors of each queue: those that it is given by number, else `all`.
pub(crate) fn of_queues(
    num_queues: u16,
    all: Option<&Cpus>,
    single: Option<&QueueAffinity>,
) -> Result<Vec<Option<Cpus>>, Failure> {
    if all.is_none() && single.is_none() {
        return Ok(Vec::new());
    }
    let usable = Cpus::usable().map_err(|error| Failure::of(&error))?;
    let mut queues = vec![all.cloned(); usize::from(num_queues.min(QUEUES_MAX))];
    for (queue, cpus) in single.iter().flat_map(|single| &single.0) {
        let count = queues.len();
        let place = queues.get_mut(*queue).ok_or_else(|| {
            Failure::usage(format!(
                "--queue-affinity: there is no queue {queue}, they are 0 to {}",
                count - 1
            ))
        })?;
        *place = Some(cpus.clone());
    }
    let missing = all.into_iter().chain(queues.iter().flatten()).find_map(|cpus| cpus.missing_in(&usable));
    match missing {
        None => Ok(queues),
        Some(missing) => Err(Failure::usage(format!(
            "CPU {missing} can't be used, those that this process may use are {usable}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(text: &str) -> Cpus {
        text.parse().unwrap()
    }

    #[test]
    fn queue_affinity_is_read_as_cloud_hypervisor_writes_it() {
        let expected = QueueAffinity(vec![(0, cpus("0,2")), (3, cpus("1-3,5"))]);
        for text in ["0@[0,2],3@[1-3,5]", "[0@[0,2],3@[1-3,5]]"] {
            assert_eq!(text.parse(), Ok(expected.clone()), "{text}");
        }
        assert_eq!("[1@[7]]".parse(), Ok(QueueAffinity(vec![(1, cpus("7"))])));
    }

    #[test]
    fn queue_affinity_that_is_ambiguous_is_refused() {
        for text in
            ["", "[]", "0", "0@1", "0@[]", "0@[1", "0@[1],", "0@[1],0@[2]", "a@[1]", "0@[1]1@[2]", "0@[x]"]
        {
            assert!(text.parse::<QueueAffinity>().is_err(), "{text}");
        }
    }
}

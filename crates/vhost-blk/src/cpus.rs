//! Sets of the host's processors.

use std::{collections::BTreeSet, fmt, io, str::FromStr, thread};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Processors that a thread may run on; never none.
///
/// As text: numbers and ranges, as in `0-3,8`; `cpuset(7)` calls this the list format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus(BTreeSet<usize>);

impl Cpus {
    /// Those that this process may use, if it asks for them.
    pub fn usable() -> io::Result<Self> {
        let all: BTreeSet<usize> = (0..CpuSet::MAX_CPU).collect();
        // In a thread of its own, as there is no other way to ask.
        let asking = thread::Builder::new().name("cpus".to_owned()).spawn(move || {
            Self(all).confine()?;
            let allowed = sched_getaffinity(None)?;
            Ok(Self((0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()))
        })?;
        asking.join().unwrap_or_else(|_| Err(io::Error::other("asking for the processors failed")))
    }

    /// Those that are not among `others`.
    pub fn missing_in(&self, others: &Self) -> Option<Self> {
        let missing: BTreeSet<usize> = self.0.difference(&others.0).copied().collect();
        (!missing.is_empty()).then_some(Self(missing))
    }

    /// Confines the calling thread to them.
    pub(crate) fn confine(&self) -> io::Result<()> {
        let mut set = CpuSet::new();
        for cpu in self.0.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
            set.set(*cpu);
        }
        Ok(sched_setaffinity(None, &set)?)
    }
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.parse::<usize>() {
            Ok(cpu) if cpu < CpuSet::MAX_CPU => Ok(cpu),
            Ok(cpu) => Err(format!("CPU {cpu} is beyond {}", CpuSet::MAX_CPU - 1)),
            Err(_) => Err(format!("\"{text}\" is not a CPU, expected a list such as 0-3,8")),
        };
        let mut cpus = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(format!("{part} is no range, it ends before it begins"));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_as_text_are_a_list_of_ranges() {
        for (text, again) in
            [("0", "0"), ("3,1,2,8", "1-3,8"), ("0-3,2-5", "0-5"), ("7-7", "7"), ("1023", "1023")]
        {
            assert_eq!(text.parse::<Cpus>().unwrap().to_string(), again);
        }
    }

    #[test]
    fn cpus_that_are_none_are_refused() {
        for text in ["", ",", "1,", "a", "-1", "1-", "3-2", "0-1024", "1024", "1 2"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn cpus_that_are_usable_confine_a_thread() {
        let usable = Cpus::usable().unwrap();
        let first: Cpus = usable.to_string().split([',', '-']).next().unwrap().parse().unwrap();
        assert_eq!(first.missing_in(&usable), None);
        let beyond: Cpus = "0-1023".parse().unwrap();
        assert!(beyond.missing_in(&usable).is_some());
        let confined = thread::spawn(move || {
            first.confine().unwrap();
            let set = sched_getaffinity(None).unwrap();
            set.count() == 1 && first.0.iter().all(|cpu| set.is_set(*cpu))
        });
        assert!(confined.join().unwrap());
    }
}

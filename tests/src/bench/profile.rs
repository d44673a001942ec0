//! Where a request's processor time goes: samples of a backend under load, by `perf`.

use std::process::Command;

use rustix::process::Signal;

use crate::PATIENCE;
use crate::process::Process;
use crate::program::{run, scratch_dir, scratch_root};

/// Samples of a process, as shares of all of its samples.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Profile {
    /// Functions, the largest first: what they are part of, their name, and their share, without what they call.
    pub functions: Vec<(String, String, f64)>,
    /// System calls, the largest first, with all that is done in them.
    pub calls: Vec<(String, f64)>,
}

/// Samples `pid`, all of its threads and those that the kernel has for it, while `load` runs; what that returned, and the
/// samples. `None`: `perf` does not do that here.
pub fn profiled<T>(pid: u32, load: impl FnOnce() -> T) -> (T, Option<Profile>) {
    let dir = scratch_dir(&scratch_root());
    let data = dir.path().join("perf.data");
    // Of all processes: a thread that is made later would not be looked at.
    let mut record = Command::new("perf");
    record.args(["record", "-q", "-a", "-g", "-e", "cpu-clock", "-F", "1999", "-o"]).arg(&data);
    let mut record = Process::spawn("perf record", &record);
    let result = load();
    if record.ended() {
        return (result, None);
    }
    // It writes its file to its end.
    record.signal(Signal::INT);
    record.wait(PATIENCE);
    let report = |more: &[&str]| {
        let mut report = Command::new("perf");
        report
            .args(["report", "--stdio", "-g", "none", "-t", "|", "--pid", &pid.to_string(), "-i"])
            .arg(&data);
        run(report.args(more)).stdout
    };
    let functions = report(&["--no-children", "--fields", "overhead,dso,symbol"]);
    let calls = report(&["--children", "--fields", "overhead_children,symbol"]);
    (result, Some(Profile::parsed(&functions, &calls)))
}

impl Profile {
    /// Out of what `perf report` prints: of all samples that are shown, whoever's the others are.
    fn parsed(functions: &str, calls: &str) -> Self {
        let rows = |text: &str| -> Vec<(f64, Vec<String>)> {
            let row = |line: &str| {
                let mut fields = line.split('|').map(str::trim);
                let share = fields.next()?.strip_suffix('%')?.parse().ok()?;
                Some((share, fields.map(str::to_owned).collect()))
            };
            text.lines().filter_map(row).collect()
        };
        let functions = rows(functions);
        let all: f64 = functions.iter().map(|(share, _)| share).sum();
        let of_all = |share: f64| if all > 0.0 { share / all } else { 0.0 };
        let functions = functions.into_iter().filter_map(|(share, fields)| {
            let [object, symbol] = <[String; 2]>::try_from(fields).ok()?;
            Some((object_name(&object), symbol_name(&symbol).to_owned(), of_all(share)))
        });
        let mut profile = Self { functions: functions.collect(), calls: Vec::new() };
        for (share, fields) in rows(calls) {
            let Some(call) = fields.first().and_then(|symbol| call_name(symbol_name(symbol))) else {
                continue;
            };
            // The entry and the function that does it, of which only one may be seen.
            match profile.calls.iter_mut().find(|(name, _)| name == call) {
                Some((_, known)) => *known = known.max(of_all(share)),
                None => profile.calls.push((call.to_owned(), of_all(share))),
            }
        }
        profile.functions.sort_by(|a, b| b.2.total_cmp(&a.2));
        profile.calls.sort_by(|a, b| b.1.total_cmp(&a.1));
        profile
    }
}

fn object_name(object: &str) -> String {
    if object.contains("kernel") { "kernel".into() } else { object.to_owned() }
}

/// The system call that a function of the kernel does.
fn call_name(function: &str) -> Option<&str> {
    const VECTORS: [&str; 4] = ["do_preadv", "do_pwritev", "do_readv", "do_writev"];
    let rest = |prefix| function.strip_prefix(prefix);
    match ["__x64_sys_", "__do_sys_", "ksys_"].into_iter().find_map(rest) {
        Some(name) => Some(name),
        None => VECTORS.contains(&function).then(|| function.trim_start_matches("do_")),
    }
}

/// Without the mark for user or kernel, and without a hash.
fn symbol_name(symbol: &str) -> &str {
    let name = symbol.split_once(']').map_or(symbol, |(_, name)| name).trim();
    name.split_once("::h").filter(|(_, hash)| hash.len() == 16).map_or(name, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_samples_that_are_shown() {
        let functions = "# To display\n\n# Overhead|Shared Object|Symbol\n 30.00%|[kernel.kallsyms]|[k] rep_movs_alternative\n  \
                         15.00%  |pristine         |[.] blockio::now::write_now  \n 5.00%|libc.so.6|[.] write\n";
        let calls = "# c\n 25.00% |[k] do_pwritev\n 20.00%|[k] __x64_sys_pwritev\n 10.00%|[k] ksys_write\n 9.00%|[k] __do_sys_futex\n 40.00%|[k] do_it\n";
        let profile = Profile::parsed(functions, calls);
        let function = |object: &str, name: &str, share| (object.to_owned(), name.to_owned(), share);
        assert_eq!(
            profile.functions,
            [
                function("kernel", "rep_movs_alternative", 0.6),
                function("pristine", "blockio::now::write_now", 0.3),
                function("libc.so.6", "write", 0.1),
            ]
        );
        assert_eq!(
            profile.calls,
            [("pwritev".to_owned(), 0.5), ("write".to_owned(), 0.2), ("futex".to_owned(), 0.18)]
        );
        assert_eq!(Profile::parsed("", "nonsense"), Profile::default());
    }
}

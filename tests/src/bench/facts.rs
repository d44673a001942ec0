//! What a reader must know about the machine and the day to make anything of the numbers.

use std::process::Command;

use crate::program::run;

/// A Markdown list: machine, kernel, versions, date.
pub(super) fn facts(plan: &str) -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown", |(_, model)| model.trim());
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    format!(
        "- {cpus} processors: {model}; {} GiB of memory; Linux {}\n- {}\n- pristine {}, {}\n- {plan}\n",
        (memory + (1 << 19)) >> 20,
        said("uname", &["-r"]),
        said("qemu-storage-daemon", &["--version"]),
        said("git", &["describe", "--always", "--dirty", "--abbrev=10"]),
        said("date", &["-u", "+%F"]),
    )
}

/// The first line that a command prints; "unknown" if it fails.
fn said(program: &str, args: &[&str]) -> String {
    let finished = run(Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")));
    match finished.code {
        Some(0) => finished.stdout.lines().next().unwrap_or("unknown").trim().to_owned(),
        _ => "unknown".into(),
    }
}

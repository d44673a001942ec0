//! `promote` step by step: killed, failing, asked to stop, and in which order it makes things durable.

use std::fs;
use std::path::Path;
use std::process::Command;

use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::{Finished, pristine, run};

use super::{CHANGED, NONE, PARTS, base, json, maintained, others, part, promote};

/// The calls that change something on a file system, or make it durable.
const CALLS: [&str; 14] = [
    "write",
    "pwrite64",
    "ftruncate",
    "fallocate",
    "fchmod",
    "fchown",
    "fsync",
    "fdatasync",
    "ioctl",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "unlink",
];

/// `promote` under strace, which does `what` when `call` is made for the time number `time`.
fn promote_with(lab: &Lab, to: &Path, what: &str, (call, time): (&str, u32)) -> Finished {
    let promote = lab.pristine("promote", NONE);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qqq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    strace.args(["-e", &format!("inject={call}:{what}:when={time}")]);
    run(strace.arg(promote.get_program()).args(promote.get_args()).arg("--to").arg(to))
}

/// Whether the generation is there; then it is whole, and it is removed.
fn take(lab: &Lab, new: &Path, root: &str) -> bool {
    if !new.exists() {
        return false;
    }
    base("verify", new).ok();
    let found = json(run(pristine(["base", "list", "--json", "--dir"]).arg(lab.path(""))));
    let found = found["generations"]
        .as_array()
        .unwrap()
        .iter()
        .find(|listed| listed["base"] == new.to_str().unwrap());
    let found = found.unwrap_or_else(|| panic!("{} is not listed", new.display()));
    assert_eq!((&found["root"], &found["changed_blocks"]), (&root.into(), &CHANGED.into()), "{found}");
    assert_eq!(found["troubles"], serde_json::json!([]));
    PARTS.iter().for_each(|suffix| fs::remove_file(part(new, suffix)).unwrap());
    true
}

/// Issue line 4, by killing and by failing: at every step of `promote`.
fn at_every_step(name: &str) {
    let lab = maintained(true);
    let new = lab.path(name);
    let root = json(promote(&lab, &new, &["--json"]))["root"].as_str().unwrap().to_owned();
    let before = (images::sha256(&lab.disk()), images::sha256(&lab.base()), lab.status());
    assert!(take(&lab, &new, &root));

    let (mut steps, mut whole) = (Vec::new(), 0);
    for call in CALLS {
        for time in 1.. {
            let step = (call, time);
            let finished = promote_with(&lab, &new, "signal=KILL", step);
            let there = take(&lab, &new, &root);
            if finished.code == Some(0) {
                assert!(there);
                break;
            }
            steps.push(step);
            if there {
                whole += 1;
                continue;
            }
            // What is left is told, never believed, and replaced.
            let left = others(&lab);
            if !left.is_empty() {
                assert!(left.contains(&format!("{name}.promoting")), "killed at {step:?}: {left:?}");
                let said = run(pristine(["base", "list", "--dir"]).arg(lab.path(""))).ok().stdout;
                assert!(said.contains("half-made") && !said.contains(&format!("└ {name}")), "{said}");
            }
            let said = promote(&lab, &new, NONE).ok().stdout;
            assert_eq!(said.contains("interrupted had left"), !left.is_empty(), "killed at {step:?}: {said}");
            assert!(take(&lab, &new, &root), "killed at {step:?}");
            assert_eq!(others(&lab), [""; 0], "killed at {step:?}");
        }
    }
    assert!(steps.len() > 15 && whole >= 1, "{steps:?}, {whole} of them after the last name was given");

    // A full file system, and the operator's wish to stop.
    for what in ["error=ENOSPC", "signal=TERM"] {
        for step in steps.iter().copied() {
            let finished = promote_with(&lab, &new, what, step);
            let left = others(&lab);
            match finished.code {
                // What is printed at the end, and what promote can do without; or it was done.
                Some(0) => assert!(take(&lab, &new, &root), "{what} at {step:?}"),
                Some(1) if new.exists() => assert!(take(&lab, &new, &root), "{what} at {step:?}"),
                Some(1) => assert_eq!(left, [""; 0], "{what} at {step:?}: {finished:#?}"),
                _ => panic!("{what} at {step:?}: {finished:#?}"),
            }
        }
    }
    assert_eq!((images::sha256(&lab.disk()), images::sha256(&lab.base()), lab.status()), before);
    println!("{name}: killed at {} steps, {whole} of them with the generation there", steps.len());
}

#[test]
fn promote_to_raw_killed_or_failing_at_every_step_leaves_all_or_nothing() {
    at_every_step("golden-2.img");
}

#[test]
fn promote_to_qcow2_killed_or_failing_at_every_step_leaves_all_or_nothing() {
    at_every_step("golden-2.qcow2");
}

/// Where the first line that has all of `words` is, after line `from`.
#[track_caller]
fn find(lines: &[&str], from: usize, words: &[&str]) -> usize {
    let found = lines.iter().skip(from).position(|line| words.iter().all(|word| line.contains(word)));
    from + found
        .unwrap_or_else(|| panic!("no line with {words:?} from line {from} on:\n{}", lines.join("\n")))
}

/// Issue line 4, a power cut: what has a name is durable. All parts are synced after they were written, then named; the image is
/// named last, when the names of the others are durable.
#[test]
fn promote_names_nothing_that_is_not_synced_and_the_image_last() {
    for name in ["golden-2.img", "golden-2.qcow2"] {
        let lab = maintained(true);
        let (new, trace) = (lab.path(name), lab.path("trace"));
        let promote = lab.pristine("promote", NONE);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-y", "-o", trace.to_str().unwrap(), "-e", &format!("trace={}", CALLS.join(","))]);
        run(strace.arg(promote.get_program()).args(promote.get_args()).arg("--to").arg(&new)).ok();
        let trace = fs::read_to_string(trace).unwrap();
        let lines: Vec<&str> = trace.lines().collect();
        let dir = &format!("<{}>)", fs::canonicalize(lab.path("")).unwrap().display());
        let mut named = 0;
        for suffix in [".delta", ".manifest", ""] {
            let temporary = format!("{name}.promoting{suffix}");
            let rename =
                find(&lines, 0, &["rename", &format!("{temporary}\""), &format!("{name}{suffix}\"")]);
            let is_of = |line: &str| {
                line.contains(&format!("{temporary}>")) || line.contains(&format!("{temporary}.new>"))
            };
            let writes = ["write", "ftruncate", "fallocate", "fchmod"];
            let mut before = lines.iter().take(rename);
            let written =
                before.rposition(|line| is_of(line) && writes.iter().any(|call| line.contains(call)));
            let after = &lines[written.unwrap()..rename];
            let synced = after.iter().any(|line| is_of(line) && line.contains("fsync("));
            assert!(synced, "{temporary} is named before it is synced:\n{trace}");
            if suffix.is_empty() {
                assert!(
                    find(&lines, named, &["fsync(", dir]) < rename,
                    "the names beside it are not durable:\n{trace}"
                );
            }
            named = rename;
        }
        find(&lines, named, &["fsync(", dir]);
    }
}

//! The threads of a server: their names, where they run, and that they sleep when there is nothing to do.

use std::collections::BTreeMap;
use std::fs;

use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::run;
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;

fn provisioned() -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), 4 << 20, 11);
    lab.provision(&[]);
    lab
}

/// A field of the status of each thread of a process, by the thread's name.
fn of_threads(pid: u32, field: &str) -> BTreeMap<String, String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let threads = tasks.map(|task| {
        let task = task.unwrap().path();
        let status = read(task.join("status"));
        let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        (read(task.join("comm")).trim().to_owned(), value.trim().to_owned())
    });
    threads.collect()
}

/// The first and the last processor that this test may use.
fn two_cpus() -> [String; 2] {
    let list = of_threads(std::process::id(), "Cpus_allowed_list:").into_values().next().unwrap();
    let mut numbers = list.split([',', '-']).map(str::to_owned);
    let first = numbers.next().unwrap();
    let last = numbers.next_back().unwrap_or_else(|| first.clone());
    [first, last]
}

fn wait_for_threads(server: &Server, expected: &[(&str, &str)]) {
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(name, cpus)| ((*name).to_owned(), (*cpus).to_owned())).collect();
    wait_until(&format!("the queues' threads are {expected:?}"), || {
        let mut threads = of_threads(server.0.pid(), "Cpus_allowed_list:");
        threads.retain(|name, _| name.starts_with("pristine-q"));
        threads == expected
    });
}

/// `top -H` tells queues apart, and each runs where the command line says.
#[test]
fn queue_threads_have_names_and_run_on_their_own_cpus() {
    let lab = provisioned();
    let [first, last] = two_cpus();
    let affinity = format!("[0@[{last}],2@[{first}]]");
    let server = lab.serve(&["--num-queues", "4", "--cpus", &first, "--queue-affinity", &affinity]);
    let mut client = Remote::connected(&lab.socket(), 3);
    client.ask("read 0 4096");
    wait_for_threads(&server, &[("pristine-q0", &last), ("pristine-q1", &first), ("pristine-q2", &first)]);
    client.leave();
    server.stop();
}

/// Without options the threads run where the process may.
#[test]
fn queue_threads_without_affinity_run_where_the_process_may() {
    let lab = provisioned();
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("read 0 4096");
    let all = of_threads(std::process::id(), "Cpus_allowed_list:").into_values().next().unwrap();
    wait_for_threads(&server, &[("pristine-q0", &all)]);
    client.leave();
    server.stop();
}

/// A mistake is told at once, and a guest never runs elsewhere than was asked for.
#[test]
fn serve_on_cpus_that_are_not_there_is_refused() {
    let lab = provisioned();
    let refused = |args: &[&str], words: &[&str]| {
        let mut command = lab.pristine("serve", args);
        run(command.arg("--socket-path").arg(lab.socket())).refused(2, words);
        assert!(!lab.socket().exists());
    };
    refused(&["--cpus", "1023"], &["CPU 1023 can't be used", "may use are"]);
    refused(&["--queue-affinity", "0@[1020-1023]"], &["CPU 1020-1023 can't be used"]);
    refused(&["--num-queues", "2", "--queue-affinity", "2@[0]"], &["no queue 2", "0 to 1"]);
    for (option, value, words) in [
        ("--cpus", "3-1", "it ends before it begins"),
        ("--queue-affinity", "0@1", "expected QUEUE@[CPUS]"),
        ("--poll-max-us", "always", "expected microseconds from 0 to 10000, or auto"),
    ] {
        let mut command = lab.pristine("serve", &[option, value]);
        let finished = run(command.arg("--socket-path").arg(lab.socket()));
        assert!(finished.code == Some(2) && finished.stderr.contains(words), "{finished:#?}");
    }
}

/// Must show 8: an idle disk costs no processor time, with a guest connected and without.
#[test]
fn threads_of_an_idle_server_sleep() {
    let lab = provisioned();
    let server = lab.serve(&[]);
    let asleep = |what: &str| {
        let switches = || of_switches(server.0.pid());
        let mut before = switches();
        wait_until(what, || {
            std::thread::sleep(std::time::Duration::from_millis(200));
            let now = switches();
            std::mem::replace(&mut before, now.clone()) == now
        });
    };
    asleep("a server without a guest sleeps");
    let mut client = Remote::connected(&lab.socket(), 2);
    client.ask("scatter 200 3");
    asleep("a server whose guest does nothing sleeps");
    client.leave();
    lab.wait_pristine();
    asleep("a server that has restored its disk sleeps");
    server.stop();
}

/// How often each thread has gone to sleep or was preempted.
fn of_switches(pid: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut switches: Vec<_> = tasks
        .map(|task| {
            let task = task.unwrap().path();
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            let counts: Vec<&str> = status.lines().filter(|line| line.contains("ctxt_switches")).collect();
            (task.display().to_string(), counts.join(" "))
        })
        .collect();
    switches.sort();
    switches
}

/// Pages of the guest's memory that are first touched by the server shall be huge, if the host's policy
/// is to ask: every mapping of it is advised so.
#[test]
fn guest_memory_is_mapped_for_huge_pages() {
    let lab = provisioned();
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("read 0 4096");
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", server.0.pid())).unwrap();
    // A mapping's lines: its range and its file, its numbers, its flags.
    let (mut of_guest, mut seen) = (false, 0);
    for line in smaps.lines() {
        if line.split('-').next().is_some_and(|word| u64::from_str_radix(word, 16).is_ok()) {
            of_guest = line.contains("/memfd:libblkio-buf");
        } else if of_guest && let Some(flags) = line.strip_prefix("VmFlags:") {
            assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
            seen += 1;
        }
    }
    assert!(seen > 0, "{smaps}");
    client.leave();
    server.stop();
}

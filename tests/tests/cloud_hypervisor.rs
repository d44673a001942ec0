//! Cloud Hypervisor, the real program, as the frontend: what a reboot, a power-off and the end of
//! either process mean to its guest's session.
//!
//! Runs where `PRISTINE_CLOUD_HYPERVISOR` names the program, and is skipped elsewhere. `PRISTINE_KILLS`
//! is how often the server is ended under a writing guest (3), two times of three with `kill -9`;
//! `PRISTINE_UPGRADES` how often it is upgraded (3).

use std::thread::sleep;
use std::time::{Duration, Instant};

use pristine_tests::cloud::{Host, program};

/// Three boots of one session: a file is written in each, and those before are read. The first ends
/// with an orderly reboot, the second like a press of the reset button, the third with a power-off.
const REBOOTS: &str = "
    mount /dev/vda /mnt
    boot=$(ls /mnt | grep -c '^file') || true
    for file in /mnt/file*; do
        [ $boot = 0 ] || [ \"$(sha256sum <$file)\" = \"$(cat /mnt/sum${file#/mnt/file})\" ] || say wrong $file
    done
    head -c 1500000 /dev/urandom >/mnt/file$boot
    sha256sum </mnt/file$boot >/mnt/sum$boot
    sync
    say boot$boot $(cut -d ' ' -f 1 /proc/uptime)
    if [ $boot = 1 ]; then echo b >/proc/sysrq-trigger; sleep 60; fi
    umount /mnt
    [ $boot = 2 ] || { sync; reboot -f; sleep 60; }
";

/// Invariants 3, 2 and 4: a guest's reboot (the end of the connection, and a new one by the same process)
/// keeps the session and what was written in it; the guest's power-off ends it, and the disk is the base
/// again.
#[test]
fn cloud_hypervisor_guest_keeps_its_session_at_reboots_and_loses_it_at_power_off() {
    let Some(vmm) = program() else { return };
    let mut host = Host::boot(&vmm, REBOOTS);
    host.serve();
    host.start_guest();
    let begin = Instant::now();
    for boot in 0..3 {
        let uptime = host.said(&format!("boot{boot}"));
        println!(
            "boot {boot}: at {:.1?} on this machine, at {uptime} s of the guest's clock",
            begin.elapsed()
        );
        assert_eq!(host.served_count("started"), 1, "{}", host.logs());
        assert_eq!(host.served_count("ended"), 0, "{}", host.logs());
    }
    assert_eq!(host.said("job-ended"), "0", "{}", host.logs());
    host.wait_exit();
    host.wait("the session ends", "grep -q 'ended.*process is gone' /run/served");
    assert_eq!(host.console_count("wrong"), 0, "{}", host.logs());
    host.assert_pristine();
    host.finish();
}

/// Invariant 3: the server is killed while the guest reboots, and the next one goes on with the session: the
/// VMM's process is the same, though its connection and its rings are new.
#[test]
fn server_killed_while_a_cloud_hypervisor_guest_reboots_goes_on_with_the_session() {
    let Some(vmm) = program() else { return };
    let mut host = Host::boot(&vmm, REBOOTS);
    host.serve();
    host.start_guest();
    for boot in 0..3 {
        host.said(&format!("boot{boot}"));
        if boot < 2 {
            host.kill("server");
            sleep(pause(boot));
            host.serve();
        }
        // Nor did the first server see more than one session begin: the guest finds its files.
        assert_eq!(host.served_count("started"), 0, "{}", host.logs());
    }
    assert_eq!(host.said("job-ended"), "0", "{}", host.logs());
    host.wait_exit();
    host.wait("the session ends", "grep -q 'ended.*process is gone' /run/served");
    assert_eq!(host.console_count("wrong"), 0, "{}", host.logs());
    host.assert_pristine();
    host.finish();
}

/// Writers that each write files anew, in turn: two through the page cache with fsync, two with O_DIRECT.
/// What was acknowledged is remembered outside of the disk. A reader reads a file of the base. When they
/// are ordered to, they stop, and everything is read again from the disk.
const WRITERS: &str = "
    mount /dev/vda /mnt
    golden=$(sha256sum </mnt/golden)
    writer() {
        set +e
        mkdir /mnt/$1 /tmp/$1
        n=0
        while [ ! -e /tmp/stop ]; do
            n=$((n + 1)); slot=$((n % 20))
            head -c $((4096 * (1 + n * 7 % 31))) /dev/urandom >/tmp/$1/data
            if dd if=/tmp/$1/data of=/mnt/$1/$slot bs=32k $2 conv=fsync 2>/tmp/$1/error; then
                sha256sum </tmp/$1/data >/tmp/$1/sum$slot
                say tick-$1 $n
            else
                say write-failed $1 $n $(cat /tmp/$1/error)
            fi
        done
    }
    reader() {
        set +e
        while [ ! -e /tmp/stop ]; do
            dd if=/mnt/golden of=/tmp/golden bs=64k iflag=direct 2>/dev/null || say read-failed
            [ \"$(sha256sum </tmp/golden)\" = \"$golden\" ] || say read-wrong
        done
    }
    writer a & writer b oflag=direct & writer c & writer d oflag=direct & reader &
    say writing
    until dd if=/dev/vdb bs=4k count=1 iflag=direct 2>/dev/null | grep -q stop; do usleep 100000; done
    touch /tmp/stop
    wait
    umount /mnt
    mount /dev/vda /mnt
    echo 3 >/proc/sys/vm/drop_caches
    files=0
    for sum in /tmp/?/sum*; do
        file=/mnt/${sum#/tmp/}; file=${file%/sum*}/${file#*/sum}
        [ \"$(sha256sum <$file)\" = \"$(cat $sum)\" ] || say lost $file
        files=$((files + 1))
    done
    say kernel-errors $(dmesg | grep -c -i -E 'i/o error|ext4-fs (error|warning)|aborting journal')
    umount /mnt
    say verified $files
";
const NAMES: [char; 4] = ['a', 'b', 'c', 'd'];

/// Waits until every writer has finished `more` more files.
fn wait_for_writes(host: &mut Host, more: u32) {
    let counts = NAMES.map(|name| host.console_count(&format!("tick-{name}")));
    for (name, count) in NAMES.into_iter().zip(counts) {
        host.wait_console_count(&format!("tick-{name}"), count + more);
    }
}

/// Invariants 2 and 4: `kill -9` of Cloud Hypervisor under a writing guest ends the session, and the
/// disk is the base again.
#[test]
fn cloud_hypervisor_killed_while_its_guest_writes_leaves_a_pristine_disk() {
    let Some(vmm) = program() else { return };
    let mut host = Host::boot(&vmm, WRITERS);
    host.serve();
    host.start_guest();
    host.said("writing");
    wait_for_writes(&mut host, 3);
    assert_eq!(host.served_count("ended"), 0);
    host.kill("vmm");
    host.wait("the session ends", "grep -q 'ended.*process is gone' /run/served");
    host.assert_pristine();
    host.finish();
}

/// Invariants 3 and 2: `kill -9` or SIGTERM of the server under a writing guest, and a new one on the same
/// socket: the guest sees no error, every write that was acknowledged is there, and afterwards the disk is
/// the base again.
#[test]
fn server_ended_under_a_writing_cloud_hypervisor_guest_loses_nothing() {
    let Some(vmm) = program() else { return };
    let kills = std::env::var("PRISTINE_KILLS").map_or(3, |kills| kills.parse().unwrap());
    let mut host = Host::boot(&vmm, WRITERS);
    host.serve();
    host.start_guest();
    host.said("writing");
    for round in 0..kills {
        wait_for_writes(&mut host, 2);
        sleep(pause(round));
        if round % 3 == 2 {
            host.terminate("server");
        } else {
            host.kill("server");
        }
        sleep(pause(round * 3));
        let before = host.console_count("tick");
        let begin = host.uptime();
        host.serve();
        let listening = host.uptime();
        host.wait_console_count("tick", before + 1);
        let served = host.uptime();
        println!(
            "end {round}: listening after {:.2} s, the guest's next write was done {:.2} s later",
            listening - begin,
            served - listening
        );
    }
    println!("{kills} ends of the server, {} reconnections", host.reconnections());
    assert_eq!(host.reconnections(), kills);
    assert_nothing_lost(&mut host);
    host.assert_pristine();
    host.finish();
}

/// Invariant 3: an upgrade under a writing guest, by a service manager that keeps the connection: Cloud
/// Hypervisor does not even connect again.
#[test]
fn upgrade_under_a_writing_cloud_hypervisor_guest_keeps_its_connection_and_loses_nothing() {
    let Some(vmm) = program() else { return };
    let upgrades = std::env::var("PRISTINE_UPGRADES").map_or(3, |upgrades| upgrades.parse().unwrap());
    let mut host = Host::boot(&vmm, WRITERS);
    host.serve_as_service();
    host.start_guest();
    host.said("writing");
    for round in 0..upgrades {
        wait_for_writes(&mut host, 2);
        sleep(pause(round));
        let begin = host.uptime();
        let before = host.console_count("tick");
        host.upgrade();
        host.wait_console_count("tick", before + 1);
        println!("upgrade {round}: {:.2} s with the guest's next write", host.uptime() - begin);
    }
    assert_eq!(host.reconnections(), 0, "{}", host.logs());
    assert_nothing_lost(&mut host);
    host.wait_state("pristine");
    host.end_service();
    host.assert_restored();
    println!("{upgrades} upgrades: {}", host.run("grep manager: /run/served"));
    host.finish();
}

/// Stops the writers and lets the guest check everything; returns when its session has ended.
#[track_caller]
fn assert_nothing_lost(host: &mut Host) {
    wait_for_writes(host, 2);
    host.order("stop");
    let files: u32 = host.said("verified").parse().unwrap();
    assert_eq!(host.said("kernel-errors"), "0", "{}", host.logs());
    for bad in ["write-failed", "read-failed", "read-wrong", "lost"] {
        assert_eq!(host.console_count(bad), 0, "{bad}: {}", host.logs());
    }
    assert!(files > 20, "only {files} files: the test proves little");
    host.wait_exit();
    host.wait("the session ends", "grep -q 'ended.*process is gone' /run/served");
    println!("{files} files verified");
}

/// Between a kill and what follows it: another time in each round.
fn pause(round: u32) -> Duration {
    Duration::from_millis(u64::from(round * 137 % 500))
}

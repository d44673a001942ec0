//! Many disks on one host, whose VMs do nothing.

use std::path::PathBuf;
use std::time::Duration;

use super::{Plan, progress};
use crate::bench::machine::{cpu_seconds, memory_of, settle};
use crate::bench::report::{Better, Role, Section, short};
use crate::images;
use crate::lab::Lab;
use crate::peer::{Image, storage_daemon};
use crate::process::Process;
use crate::remote::Remote;

/// Bytes of each disk, and of its data at the beginning.
const SIZE: u64 = 1 << 30;
const DATA: u64 = 4 << 20;

pub(super) fn compare(plan: &Plan) -> Vec<Section> {
    let section = |what: &str, unit| {
        let section = Section::new(what, unit, Better::Lower).column("pristine", Role::Ours);
        section.column("qemu-storage-daemon, io_uring", Role::Peer)
    };
    let mut cpu = section("Idle disks: processor time", "% of one processor, all servers together").note(format!(
        "So many servers, each with a disk of 1 GiB and a connected client that has read and written a little; then \
         nothing happens for {} s.",
        plan.idle.as_secs_f64()
    ));
    let mut memory = section("Idle disks: memory of each server", "MiB").note(
        "PSS (a page that n processes share counts 1/n), without the guest's memory. `anonymous`: of it what is no \
         file's.",
    )
    .column("pristine, anonymous", Role::Info);
    for &count in &plan.disks {
        let labs: Vec<Lab> = (0..count).map(|_| Lab::in_dirs(&plan.disk, &plan.tmpfs)).collect();
        for lab in &labs {
            for image in [lab.base(), lab.path("peer.img")] {
                images::sparse(&image, SIZE, 1, &[(0, DATA)]);
            }
        }
        let ours = watch(&labs, plan.idle, |lab| {
            lab.provision(&[]);
            (lab.serve(&[]).0, lab.socket())
        });
        let peer = watch(&labs, plan.idle, |lab| {
            let socket = lab.runtime().join("peer");
            let disk = lab.path("peer.img");
            let image = Image { aio: "io_uring", ..Image::raw(&disk) };
            (storage_daemon(&[], &image, &socket, 1), socket)
        });
        progress(&format!(
            "{count} idle disks: {} % and {} MiB each; qemu-storage-daemon {} % and {} MiB",
            short(ours.percent),
            short(ours.mib),
            short(peer.percent),
            short(peer.mib)
        ));
        cpu.row(count.to_string(), vec![Some(ours.percent), Some(peer.percent)]);
        memory.row(count.to_string(), vec![Some(ours.mib), Some(peer.mib), Some(ours.anonymous_mib)]);
    }
    vec![cpu, memory]
}

struct Seen {
    percent: f64,
    mib: f64,
    anonymous_mib: f64,
}

/// Starts a server for each lab, and a client that does a little; watches the servers while nothing happens.
fn watch(labs: &[Lab], time: Duration, serve: impl Fn(&Lab) -> (Process, PathBuf)) -> Seen {
    let (servers, clients): (Vec<Process>, Vec<Remote>) = labs
        .iter()
        .map(|lab| {
            let (server, socket) = serve(lab);
            let mut client = Remote::connected(&socket, 1);
            client.ask("scatter 64 1");
            client.ask("read 0 65536");
            (server, client)
        })
        .unzip();
    settle(&labs[0].base());
    // Nothing tells from outside when a server has gone to sleep.
    std::thread::sleep(time / 5);
    let used = || servers.iter().map(|server| cpu_seconds(server.pid())).sum::<f64>();
    let before = used();
    std::thread::sleep(time);
    // A thread that ends takes its account with it.
    let percent = (used() - before).max(0.0) * 100.0 / time.as_secs_f64();
    let memory: Vec<_> = servers.iter().map(|server| memory_of(server.pid())).collect();
    clients.into_iter().for_each(Remote::kill);
    let mean = |of: fn(&crate::bench::machine::Memory) -> u64| {
        memory.iter().map(of).sum::<u64>() as f64 / memory.len() as f64 / f64::from(1 << 20)
    };
    Seen {
        percent,
        mib: mean(|memory| memory.anonymous + memory.file),
        anonymous_mib: mean(|memory| memory.anonymous),
    }
}

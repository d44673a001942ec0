//! The harness itself, with qemu-storage-daemon in the place of `pristine`: what fails here says
//! nothing about `pristine`.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::medium;
use pristine_tests::outer::{Machine, Plan, make_file_system};
use pristine_tests::peer::{Image, storage_daemon};
use pristine_tests::program::client_binary;
use pristine_tests::random::{Random, contents};
use pristine_tests::remote::Remote;

/// A guest with a file system on a disk that another program serves.
#[test]
fn guest_that_formats_and_writes_powers_off() {
    let lab = Lab::new();
    images::sparse(&lab.disk(), 64 << 20, 0, &[]);
    let _daemon = storage_daemon(&[], &Image::raw(&lab.disk()), &lab.socket(), 2);
    let mut guest = Guest::boot(
        &lab.socket(),
        Options::default(),
        "mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo hello >/mnt/f; say file $(cat /mnt/f); umount /mnt",
    );
    assert_eq!(guest.said("file"), "hello");
    guest.finish();
    assert!(images::allocated(&lab.disk()) > 1 << 20);
}

/// The client reads what it wrote, and sees the ends of requests that fail.
#[test]
fn client_of_another_backend_reads_what_it_wrote() {
    let lab = Lab::new();
    images::dense(&lab.disk(), 8 << 20, 1);
    let _daemon = storage_daemon(&[], &Image::raw(&lab.disk()), &lab.socket(), 1);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 8192 4096 5");
    client.ask("flush");
    client.leave();
    let written = std::fs::read(lab.disk()).unwrap();
    assert_eq!(written[8192..12288], contents(5, 8192, 4096));
    assert_eq!(written[..8192], contents(1, 0, 8192));
}

/// The model agrees with a backend that is known to be right, also about discards and odd sizes.
#[test]
fn model_of_another_backend_agrees() {
    let lab = Lab::new();
    images::dense(&lab.base(), 32 << 20, 1);
    std::fs::copy(lab.base(), lab.disk()).unwrap();
    let _daemon = storage_daemon(&[], &Image::raw(&lab.disk()), &lab.socket(), 4);
    let mut client = Remote::start(&lab.socket());
    client.ask(&format!("load {}", lab.base().display()));
    let summary = client.ask("model 1 20000 4 32");
    println!("{summary}");
    assert!(!summary.contains("discards: 0"), "{summary}");
}

/// The model notices a disk that does not hold the base's content.
#[test]
fn model_of_a_wrong_disk_disagrees() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 1);
    images::dense(&lab.disk(), 1 << 20, 1);
    let wrong = std::fs::OpenOptions::new().write(true).open(lab.disk()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&wrong, b"leak", 1_000_000).unwrap();
    let _daemon = storage_daemon(&[], &Image::raw(&lab.disk()), &lab.socket(), 1);
    let mut client = Remote::start(&lab.socket());
    client.ask(&format!("load {}", lab.base().display()));
    let error = client.try_ask("model 1 1 1 1").unwrap_err();
    assert!(error.contains("expected"), "{error}");
}

/// Killing a machine is a power cut: what its kernel had synced is there after the next boot, and what
/// was in its page cache only is not. Programs of the host run in it.
#[test]
fn machine_that_is_killed_has_what_it_synced_and_no_more() {
    let lab = Lab::new();
    for kind in ["ext4", "xfs"] {
        let disk = lab.path(kind);
        make_file_system(kind, &disk, 512 << 20);
        let script = format!(
            "mount -t {kind} /dev/vda /mnt; vhost-client none </dev/null; say found $(cat /mnt/synced /mnt/cached)
            echo one >/mnt/synced; sync; echo two >/mnt/cached; say written; read order"
        );
        let machine = Machine::new(Plan {
            modules: vec!["xfs".into(), "libcrc32c".into()],
            programs: vec![("bin/vhost-client".into(), client_binary())],
            script,
            ..Plan::default()
        });
        let mut guest = machine.boot(&[&disk]);
        assert_eq!(guest.said("found"), "");
        guest.said("written");
        guest.kill();
        let mut guest = machine.boot(&[&disk]);
        assert_eq!(guest.said("found"), "one", "{kind}");
        guest.type_line("end");
        guest.finish();
    }
}

/// A disk that loses its cache has what was flushed, and of the rest what chance has kept.
#[test]
fn disk_that_loses_its_power_has_what_was_flushed() {
    let lab = Lab::new();
    let (disk, before, log) = (lab.path("disk"), lab.path("before"), lab.path("log"));
    images::dense(&disk, 64 << 20, 1);
    medium::copy(&disk, &before);
    medium::new_log(&log);
    let write = "if=/dev/zero of=/dev/vda bs=64k oflag=direct";
    let script = format!(
        "dd {write} count=8; dd {write} seek=16 count=8 conv=fsync; dd {write} seek=32 count=8; say written; read order"
    );
    let machine = Machine::new(Plan { script, ..Plan::default() });
    let mut guest = machine.boot_logged(&[&disk], Some(&log));
    guest.said("written");
    guest.freeze();
    guest.cut();
    let lost = medium::lose_power(&before, &log, &mut Random::new(7)).unwrap();
    println!("{lost:?}");
    let (zeroes, bytes) = (vec![0; 512 << 10], std::fs::read(&before).unwrap());
    let part = |number: usize| &bytes[number << 20..][..512 << 10];
    assert!(part(0) == zeroes && part(1) == zeroes, "what was flushed is not there");
    assert_eq!(lost.kept + lost.lost, 128, "{lost:?}");
    let there = part(2).chunks(4096).filter(|unit| unit.iter().all(|&byte| byte == 0)).count();
    assert_eq!(there as u64, lost.kept);
    assert!(lost.lost > 0 && part(3) == contents(1, 3 << 20, 512 << 10), "{lost:?}");
}

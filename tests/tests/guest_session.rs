//! A whole session of a real Linux guest ends with a disk that equals its base.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;

const SIZE: u64 = 192 << 20;

/// What a guest does to a disk in a working day: a new file system, files, trimmed ones too.
const FORMAT_AND_WRITE: &str = "
    mkfs.ext4 -q -F /dev/vda
    mount /dev/vda /mnt
    dd if=/dev/urandom of=/mnt/big bs=1M count=24 2>/dev/null
    for i in 1 2 3 4 5 6 7 8; do echo $i >/mnt/small$i; done
    sum=$(sha256sum </mnt/big)
    umount /mnt
    mount /dev/vda /mnt
    [ \"$sum\" = \"$(sha256sum </mnt/big)\" ] && say written
    rm /mnt/small3
    fstrim /mnt
    umount /mnt
    sync
    say queues $(ls /sys/block/vda/mq | wc -l)
    say serial $(cat /sys/block/vda/serial)
    say ready
    head -n 1 </dev/console >/dev/null
";

/// Invariants 2 and 4: after the guest's `poweroff` the disk equals the base byte for byte, and holes
/// are holes again. While the guest lives `status` sees its session.
#[test]
fn guest_that_formats_and_writes_then_powers_off_leaves_a_pristine_disk() {
    let lab = Lab::new();
    images::sparse(&lab.base(), SIZE, 11, &[(0, 1 << 20), (40 << 20, 30 << 20), (SIZE - 4096, 4096)]);
    lab.provision(&[]);
    lab.assert_pristine();
    let base = images::sha256(&lab.base());

    let server = lab.serve(&["--num-queues", "4"]);
    let mut guest = Guest::boot(&lab.socket(), Options { queues: 4, ..Options::default() }, FORMAT_AND_WRITE);
    guest.said("written");
    assert_eq!(guest.said("queues"), "4");
    assert!(!guest.said("serial").is_empty(), "the disk has no serial number");
    guest.said("ready");
    let status = lab.status();
    assert_eq!(status["state"], "in-session", "{status}");
    assert!(status["dirty_blocks"].as_u64().unwrap() > 24 * 256, "{status}");
    guest.type_line("go on");
    guest.finish();

    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    assert_eq!(images::sha256(&lab.base()), base);
}

/// Invariant 4, `--once`: the server restores the disk after the session, and exits without an error.
#[test]
fn serve_once_ends_after_the_session_with_a_pristine_disk() {
    let lab = Lab::new();
    images::dense(&lab.base(), 32 << 20, 12);
    lab.provision(&[]);
    let mut server = lab.serve(&["--once"]);
    let script = "dd if=/dev/zero of=/dev/vda bs=1M count=8 seek=4 2>/dev/null; sync";
    Guest::boot(&lab.socket(), Options::default(), script).finish();
    let status = server.0.wait(pristine_tests::PATIENCE);
    assert!(status.success(), "{status}\n{}", server.0.output());
    lab.assert_pristine();
}

/// Invariant 4 for a disk that is larger than its base: the tail is zeroes in every session.
#[test]
fn disk_larger_than_its_base_has_a_tail_of_zeroes_in_every_session() {
    let lab = Lab::new();
    images::dense(&lab.base(), (8 << 20) + 512, 13);
    lab.provision(&["--size", &(16 << 20).to_string()]);
    let tail = "dd if=/dev/vda bs=1M skip=9 2>/dev/null | tr -d '\\000' | wc -c";
    let script =
        format!("say tail $({tail}); dd if=/dev/urandom of=/dev/vda bs=1M count=4 seek=7 2>/dev/null");
    let server = lab.serve(&[]);
    for _ in 0..2 {
        let mut guest = Guest::boot(&lab.socket(), Options::default(), &script);
        assert_eq!(guest.said("tail"), "0");
        guest.finish();
    }
    lab.wait_pristine();
    server.stop();
    lab.run("verify", &[""; 0]).ok();
    let disk = std::fs::read(lab.disk()).unwrap();
    let base = std::fs::read(lab.base()).unwrap();
    assert_eq!(disk.len(), 16 << 20);
    assert!(disk[..base.len()] == base && disk[base.len()..].iter().all(|&byte| byte == 0));
    assert!(images::allocated(&lab.disk()) <= (8 << 20) + (128 << 10), "the tail is no hole");
}

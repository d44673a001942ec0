//! A guest's reboot is not the end of its session; its `poweroff` is.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;

const SCRIPT: &str = "
    mount /dev/vda /mnt
    if [ -e /mnt/mark ]; then
        say after-reboot $(cat /mnt/mark)
        umount /mnt
    else
        say no-mark
        echo from-the-first-boot >/mnt/mark
        umount /mnt
        sync
        reboot -f
    fi
";

/// Invariants 3 and 2: what was written before the guest's reboot is there after it, and gone in the
/// next session.
#[test]
fn file_written_before_a_reboot_is_there_after_it_and_gone_in_the_next_session() {
    let lab = Lab::new();
    images::ext4(&lab.base(), 32 << 20, &[("readme", b"golden")]);
    lab.provision(&[]);
    let server = lab.serve(&[]);
    for _session in 0..2 {
        let mut guest = Guest::boot(&lab.socket(), Options { reboots: true, ..Options::default() }, SCRIPT);
        guest.said("no-mark");
        assert_eq!(guest.said("after-reboot"), "from-the-first-boot");
        guest.finish();
    }
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

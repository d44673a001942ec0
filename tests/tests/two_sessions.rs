//! What one session did, the next one does not see.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;

const LETTER: &[u8] = b"the golden letter\n";

/// Invariant 2: the second session, which starts at once, sees the base's files, and can write.
#[test]
fn second_session_sees_the_original_files() {
    let lab = Lab::new();
    let archive = pristine_tests::random::contents(3, 0, 3 << 20);
    images::ext4(&lab.base(), 64 << 20, &[("letter", LETTER), ("archive", &archive), ("empty", b"")]);
    let base = images::sha256(&lab.base());
    lab.provision(&[]);
    let server = lab.serve(&[]);

    let spoil = "
        mount /dev/vda /mnt
        rm /mnt/archive
        echo overwritten >/mnt/letter
        dd if=/dev/urandom of=/mnt/added bs=1M count=16 2>/dev/null
        umount /mnt
        say spoilt
    ";
    let look = "
        mount /dev/vda /mnt
        say letter $(cat /mnt/letter)
        say archive $(sha256sum </mnt/archive)
        say added $(ls /mnt/added 2>/dev/null | wc -l)
        umount /mnt
    ";
    let mut first = Guest::boot(&lab.socket(), Options::default(), spoil);
    first.said("spoilt");
    first.finish();
    let mut second = Guest::boot(&lab.socket(), Options::default(), &format!("{look}\n{spoil}"));
    assert_eq!(second.said("letter"), "the golden letter");
    std::fs::write(lab.path("archive"), &archive).unwrap();
    assert!(second.said("archive").starts_with(&images::sha256(&lab.path("archive"))));
    assert_eq!(second.said("added"), "0");
    second.finish();

    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    assert_eq!(images::sha256(&lab.base()), base);
}

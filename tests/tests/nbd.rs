//! Session disks of bases that NBD servers export: served, restored and verified while the servers come and go.

use std::fs;
use std::process::Command;
use std::time::Duration;

use pristine_tests::PATIENCE;
use pristine_tests::distribution;
use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::nbd::{Certificates, KINDS, Kind, NbdServer};
use pristine_tests::process::Process;
use pristine_tests::program::{Finished, pristine, run};
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use rustix::process::Signal;
use serde_json::Value;

const NONE: &[&str] = &[];
const SIZE: u64 = 64 << 20;
/// Of the base.
const DATA: [(u64, u64); 2] = [(0, 20 << 20), (40 << 20, 8 << 20)];
const DATA_BLOCKS: u64 = (28 << 20) / 4096;
/// Bytes per second of servers that are to be caught at work.
const RATE: u64 = 8 << 20;

/// A base that only its server has in hand, and its server.
fn served(kind: Kind, rate: u64) -> (Lab, NbdServer) {
    let lab = Lab::new();
    images::sparse(&lab.base(), SIZE, 61, &DATA);
    let server = NbdServer::start(kind, &lab.base(), rate);
    (lab, server)
}

fn provision(lab: &Lab, base: &str, more: &[&str]) -> Finished {
    lab.run("provision", &[&["--base", base], more].concat())
}

fn pending(lab: &Lab) -> u64 {
    lab.status()["pending_blocks"].as_u64().unwrap()
}

/// A server that is killed and started again in the middle of a drain holds it up, and nothing else. Invariants 2, 4.
fn drain_goes_on_after_the_server_was_killed(kind: Kind) {
    let (lab, mut nbd) = served(kind, RATE);
    let said = provision(&lab, &nbd.uri(), &["--lazy"]).ok().stderr;
    assert!(said.contains("only if its size changes") && said.contains("base seal"), "{said}");
    assert_eq!(pending(&lab), DATA_BLOCKS, "holes of the export are not to be filled");

    let server = lab.serve(&["--base-timeout", "120"]);
    let mut client = Remote::connected(&lab.socket(), 2);
    let base = lab.base();
    for (at, len) in [(10 << 20, 1 << 20), (30 << 20, 65536), (SIZE - 4096, 4096)] {
        assert_eq!(client.ask(&format!("compare {at} {len} {}", base.display())), "same", "at {at}");
    }
    // A part of a block: the rest of it comes from the server.
    client.ask(&format!("write {} 512 9", (41 << 20) + 1024));
    client.ask("scatter 2000 7");
    client.leave();

    // More than the session can have written.
    wait_until("the drain is in the middle", || images::allocated(&lab.disk()) > 14 << 20);
    nbd.kill();
    wait_until("the server is missed", || server.0.output().contains("connection lost"));
    let left = pending(&lab);
    assert!(left > 500, "only {left} blocks were left: the drain was too fast to be caught");
    nbd.start_again(&base);
    lab.wait_pristine();
    let said = server.0.output();
    assert!(said.contains("connected again") && !said.contains("restoring failed"), "{said}");
    server.stop();
    lab.run("restore", NONE).ok();
    lab.run("verify", NONE).ok();
    lab.assert_pristine();
}

#[test]
fn drain_goes_on_after_qemu_nbd_was_killed() {
    drain_goes_on_after_the_server_was_killed(Kind::QemuNbd);
}

#[test]
fn drain_goes_on_after_nbdkit_was_killed() {
    drain_goes_on_after_the_server_was_killed(Kind::Nbdkit);
}

/// The same for `restore`, which nobody serves meanwhile.
#[test]
fn restore_goes_on_after_its_server_was_killed() {
    for kind in KINDS {
        let (lab, mut nbd) = served(kind, RATE);
        provision(&lab, &nbd.uri(), &["--lazy"]).ok();
        let mut restore = Process::spawn("restore", &lab.pristine("restore", &["--base-timeout", "120"]));
        wait_until("some of it is restored", || images::allocated(&lab.disk()) > 2 << 20);
        nbd.kill();
        restore.wait_line("the missing server", PATIENCE, |line| line.contains("connection lost"));
        assert!(!restore.ended());
        nbd.start_again(&lab.base());
        assert!(restore.wait(PATIENCE).success(), "{}", restore.output());
        lab.assert_pristine();
    }
}

/// Nobody who is told to stop goes on waiting for a server that is away, whatever he waits for; what was pending stays so.
#[test]
fn stop_does_not_wait_for_a_server_that_is_away() {
    let (lab, mut nbd) = served(Kind::Nbdkit, RATE);
    let for_ever = ["--base-timeout", "3600"];
    let lost = |process: &mut Process| {
        process.wait_line("the missing server", PATIENCE, |line| line.contains("connection lost"));
    };
    let stopped = |process: &mut Process| {
        process.signal(Signal::TERM);
        process.wait(Duration::from_secs(20))
    };
    // All at once; of what was begun nothing is left.
    let uri = nbd.uri();
    let mut command = lab.pristine("provision", &for_ever);
    command.args(["--base", &uri]);
    let mut copying = Process::spawn("provision", &command);
    wait_until("some of it is copied", || lab.disk().exists() && images::allocated(&lab.disk()) > 2 << 20);
    nbd.kill();
    lost(&mut copying);
    let status = stopped(&mut copying);
    assert!(status.code() == Some(1) && copying.output().contains("stopped"), "{}", copying.output());
    assert!(!lab.disk().exists() && !lab.state().exists());

    nbd.start_again(&lab.base());
    provision(&lab, &uri, &["--lazy"]).ok();
    // A guest waits, and the drain does not.
    let mut server = lab.serve(&["--base-timeout", "3600", "--drain", "idle"]);
    let mut client = Remote::connected(&lab.socket(), 1);
    nbd.kill();
    client.send("read 0 4096");
    lost(&mut server.0);
    let status = stopped(&mut server.0);
    assert!(status.success(), "{}", server.0.output());
    client.kill();
    drop(server);

    nbd.start_again(&lab.base());
    let mut restore = Process::spawn("restore", &lab.pristine("restore", &for_ever));
    wait_until("some of it is restored", || images::allocated(&lab.disk()) > 2 << 20);
    nbd.kill();
    lost(&mut restore);
    let status = stopped(&mut restore);
    assert!(status.code() == Some(1) && restore.output().contains("stopped"), "{}", restore.output());
    assert!(pending(&lab) > 0);

    nbd.start_again(&lab.base());
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Invariant 3: a guest's read that waits for the base's server when its own is stopped is not failed. The next one has it
/// in its in-flight table, and answers it when the base's server is back.
#[test]
fn read_that_waits_when_the_server_is_stopped_is_answered_by_the_next() {
    let (lab, mut nbd) = served(Kind::QemuNbd, 0);
    provision(&lab, &nbd.uri(), &["--lazy"]).ok();
    // So slow that it has not come to the block when the guest has.
    let args = ["--base-timeout", "3600", "--rate", "64K"];
    let mut server = lab.serve(&args);
    // Past its page cache: that would ask again.
    let script = "
        say ready
        read go
        dd if=/dev/vda of=/block iflag=direct bs=4096 skip=12000 count=1 &
        until read reads writes </sys/block/vda/inflight && [ $reads -gt 0 ]; do :; done
        say waits
        if wait $!; then say block $(sha256sum </block); else say failed; fi";
    let mut guest = Guest::boot(&lab.socket(), Options { reconnects: true, ..Options::default() }, script);
    guest.said("ready");
    nbd.kill();
    guest.type_line("go");
    guest.said("waits");
    server.0.wait_line("the missing server", PATIENCE, |line| line.contains("connection lost"));
    server.0.signal(Signal::TERM);
    assert!(server.0.wait(Duration::from_secs(20)).success(), "{}", server.0.output());
    drop(server);

    nbd.start_again(&lab.base());
    let server = lab.serve(&[&args[..], &["-v"]].concat());
    let block = lab.path("block");
    fs::write(&block, &fs::read(lab.base()).unwrap()[12000 * 4096..][..4096]).unwrap();
    assert_eq!(guest.next_said(PATIENCE), Ok(format!("block {} -", images::sha256(&block))));
    assert!(server.0.output().contains("done again"), "{}", server.0.output());
    guest.finish();
    server.stop();
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Invariants 2 and 6: a server that is away for longer than is waited for makes reads of pending blocks fail, and
/// nothing else; the drain says why it fails. When it is back all is exact.
#[test]
fn server_that_stays_away_fails_reads_of_pending_blocks_and_nothing_else() {
    for kind in KINDS {
        let (lab, mut nbd) = served(kind, 0);
        provision(&lab, &nbd.uri(), &["--lazy"]).ok();
        nbd.kill();
        // What is known of the base is enough to serve what is not its.
        let server = lab.serve(&["--base-timeout", "1"]);
        let mut client = Remote::connected(&lab.socket(), 1);
        let error = client.try_ask("read 0 4096").unwrap_err();
        assert!(error.contains("error 5"), "{error}");
        let error = client.try_ask("write 8704 512 3").unwrap_err();
        assert!(error.contains("error 5"), "{error}");
        let zeroes = lab.path("zeroes");
        fs::File::create(&zeroes).unwrap().set_len(SIZE).unwrap();
        // A hole was never pending, and whole blocks need nothing of the base.
        assert_eq!(client.ask(&format!("compare {} 65536 {}", 30 << 20, zeroes.display())), "same");
        client.ask(&format!("write {} 65536 3", 1 << 20));
        client.ask(&format!("write {} 65536 3", 31 << 20));
        client.ask(&format!("read {} 65536", 1 << 20));
        wait_until("the status says why", || {
            let status = lab.status();
            let why = status["drain_error"].as_str().unwrap_or_default().to_owned();
            status["drain_failing"] == true && why.contains(&nbd.uri()) && why.contains("has not answered")
        });
        assert!(pending(&lab) > DATA_BLOCKS / 2);
        let shown = lab.run("status", NONE).ok().stdout;
        assert!(shown.contains(&nbd.uri()) && shown.contains("has not answered"), "{shown}");

        nbd.start_again(&lab.base());
        let base = lab.base();
        wait_until("the base is read again", || {
            client.try_ask(&format!("compare 0 65536 {}", base.display())).as_deref() == Ok("same")
        });
        client.ask("write 8704 512 3");
        client.leave();
        lab.wait_pristine();
        server.stop();
        lab.assert_pristine();
    }
}

/// Nor does a guest wait for it who needs nothing of the base: the drain gives back what it had wanted to read.
#[test]
fn server_that_is_silent_holds_up_no_writes_of_whole_blocks() {
    let (lab, mut nbd) = served(Kind::QemuNbd, RATE);
    provision(&lab, &nbd.uri(), &["--lazy"]).ok();
    let server = lab.serve(&["--base-timeout", "5"]);
    let mut client = Remote::connected(&lab.socket(), 1);
    wait_until("the drain has begun", || images::allocated(&lab.disk()) > 0);
    nbd.freeze();
    // It tries again and again meanwhile, what is next.
    for round in 0.. {
        for at in (0..20 << 20).step_by(65536) {
            client.ask(&format!("write {} 4096 {round}", at + (round % 16) * 4096));
        }
        if server.0.output().matches("restoring failed").count() == 2 {
            break;
        }
    }
    nbd.start_again(&lab.base());
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Who stops a server does not wait for another one that is away or silent, however long reads may wait.
#[test]
fn server_that_waits_for_the_bases_server_stops_at_once() {
    for is_frozen in [false, true] {
        let (lab, mut nbd) = served(Kind::QemuNbd, RATE);
        provision(&lab, &nbd.uri(), &["--lazy"]).ok();
        let server = lab.serve(&["--base-timeout", "3600"]);
        wait_until("the drain has begun", || images::allocated(&lab.disk()) > 0);
        if is_frozen {
            nbd.freeze();
        } else {
            nbd.kill();
            wait_until("the server is missed", || server.0.output().contains("connection lost"));
        }
        server.stop();
        nbd.start_again(&lab.base());
        lab.run("restore", NONE).ok();
        lab.assert_pristine();
    }
}

/// Invariant 5: an export of another size is not the base. Nothing of it is read, and the right one goes on.
#[test]
fn export_of_another_size_is_refused_until_the_right_one_is_back() {
    let (lab, mut nbd) = served(Kind::Nbdkit, 0);
    provision(&lab, &nbd.uri(), &["--lazy"]).ok();
    let other = lab.path("other.img");
    images::dense(&other, SIZE / 2, 62);
    nbd.start_again(&other);
    let expected = format!("has {} bytes, expected {SIZE}", SIZE / 2);
    assert!(lab.status()["base_trouble"].as_str().unwrap().contains(&expected), "{}", lab.status());
    for command in ["restore", "verify"] {
        let finished = lab.run(command, &["--base-timeout", "1"]);
        assert!(finished.code == Some(1) && finished.stderr.contains(&expected), "{finished:#?}");
    }
    nbd.start_again(&lab.base());
    assert_eq!(lab.status()["base_trouble"], Value::Null);
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Invariants 2 and 5: with a seal an export that was replaced by one of the same size is never read as good; made of
/// the image itself, the seal holds for what a server makes of it.
#[test]
fn sealed_export_that_was_replaced_is_not_read_as_good() {
    let (lab, mut nbd) = served(Kind::QemuNbd, 0);
    let (uri, manifest) = (nbd.uri(), lab.path("golden.manifest"));
    let manifest = manifest.to_str().unwrap();
    let base = |what: &str, more: &[&str]| run(pristine(["base", what, &uri]).args(more));
    base("seal", NONE).refused(2, &["--base-manifest"]);
    let root = |said: Finished| {
        let report: Value = serde_json::from_str(&said.ok().stdout).unwrap();
        report["root"].as_str().unwrap().to_owned()
    };
    let sealed = root(base("seal", &["--base-manifest", manifest, "--json"]));
    assert_eq!(root(run(pristine(["base", "seal", "--json"]).arg(lab.base()))), sealed);
    assert_eq!(root(base("info", &["--manifest", manifest, "--json"])), sealed);
    assert!(base("info", NONE).ok().stdout.contains("sealed   no"));
    base("verify", &["--base-manifest", manifest]).ok();

    let said = provision(&lab, &uri, &["--lazy", "--base-manifest", manifest]).ok().stderr;
    assert_eq!(said, "");
    assert_eq!(lab.status()["base_root"], sealed.as_str());
    let other = lab.path("other.img");
    fs::copy(lab.base(), &other).unwrap();
    images::sparse(&other, SIZE, 63, &DATA);
    nbd.start_again(&other);
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    assert!(client.try_ask("read 4096 4096").unwrap_err().contains("error 5"));
    client.leave();
    wait_until("the status says why", || {
        lab.status()["drain_error"].as_str().is_some_and(|why| why.contains("not what was sealed"))
    });
    server.stop();
    let finished = lab.run("restore", NONE);
    assert!(finished.code == Some(1) && finished.stderr.contains("not what was sealed"), "{finished:#?}");
    assert_eq!(base("verify", &["--base-manifest", manifest]).code, Some(1));

    nbd.start_again(&lab.base());
    lab.run("restore", NONE).ok();
    lab.run("verify", &["--deep"]).ok();
    lab.assert_pristine();
}

/// What can't be is refused with what to do, and leaves nothing.
#[test]
fn provision_from_a_server_that_cannot_be_had_leaves_nothing() {
    let (lab, mut nbd) = served(Kind::QemuNbd, 0);
    let refused = |base: &str, code, words: &[&str]| {
        let finished = provision(&lab, base, NONE);
        assert_eq!(finished.code, Some(code), "{finished:#?}");
        words.iter().for_each(|word| assert!(finished.stderr.contains(word), "{word}: {finished:#?}"));
        assert!(!lab.disk().exists() && !lab.state().exists());
    };
    let uri = nbd.uri();
    refused(&uri.replace("golden", "silver"), 1, &["silver", "does not have the export"]);
    refused("nbd://127.0.0.1:port/x", 2, &["port is no port"]);
    refused("nbd+unix:///x", 2, &["socket=/PATH"]);
    let named = provision(&lab, &uri, &["--base-format", "qcow2"]);
    assert!(named.code == Some(1) && named.stderr.contains("qemu-nbd --format qcow2"), "{named:#?}");
    nbd.kill();
    refused(&uri, 1, &[&uri, "refused", "--persistent"]);
}

/// Over TLS the export is read as without, also by a client that has to prove itself; a server that can't prove who it is is
/// believed nothing, and none is asked without TLS what was to be asked with it.
#[test]
fn export_over_tls_is_read_and_no_other_server_is_believed() {
    for kind in KINDS {
        let lab = Lab::new();
        images::sparse(&lab.base(), SIZE, 64, &DATA);
        let (certificates, others) =
            (Certificates::new("golden.example"), Certificates::new("golden.example"));
        let dir = certificates.dir().to_str().unwrap().to_owned();
        let mut nbd = NbdServer::with_tls(kind, &lab.base(), certificates);
        let plain = nbd.uri();
        let secure = |dir: &str, name: &str| {
            let uri = plain.replacen("nbd", "nbds", 1);
            let more = if uri.contains('?') { '&' } else { '?' };
            format!("{uri}{more}tls-certificates={dir}&tls-hostname={name}")
        };
        let refused = |uri: &str, word: &str| {
            let finished = provision(&lab, uri, NONE);
            assert!(finished.code == Some(1) && finished.stderr.contains(word), "{uri}: {finished:#?}");
        };
        refused(&plain, "nbds://");
        refused(&secure(&dir, "silver.example"), "certificate");
        refused(&secure(others.dir().to_str().unwrap(), "golden.example"), "certificate");
        let uri = secure(&dir, "golden.example");
        provision(&lab, &uri, &["--lazy"]).ok();
        nbd.start_again(&lab.base());
        lab.run("restore", NONE).ok();
        lab.assert_pristine();
    }
    let (lab, nbd) = served(Kind::QemuNbd, 0);
    let uri = nbd.uri().replacen("nbd", "nbds", 1);
    let finished = provision(&lab, &format!("{uri}?tls-hostname=golden.example"), NONE);
    assert!(finished.code == Some(1) && finished.stderr.contains("TLS not configured"), "{finished:#?}");
}

/// A disk moves from an image of this host to an export, and back: step 11, with its bases at two places.
#[test]
fn disk_moves_to_an_export_and_back() {
    for sealed in [false, true] {
        let (lab, mut nbd) = served(Kind::QemuNbd, 0);
        let (new, manifest) = (lab.path("new.img"), lab.path("new.manifest"));
        images::sparse(&new, SIZE, 61, &[DATA[0], DATA[1], (30 << 20, 1 << 20)]);
        nbd.start_again(&new);
        let (uri, manifest) = (nbd.uri(), manifest.to_str().unwrap());
        let named = if sealed {
            run(pristine(["base", "seal"]).arg(lab.base())).ok();
            run(&mut pristine(["base", "seal", &uri, "--base-manifest", manifest])).ok();
            vec!["--base-manifest", manifest]
        } else {
            Vec::new()
        };
        lab.provision(NONE);
        let moved = lab.run("rebase", &[vec!["--base", &uri, "--json"], named].concat()).ok();
        let report: Value = serde_json::from_str(&moved.stdout).unwrap();
        assert_eq!(report["base"], uri.as_str(), "{report}");
        assert_eq!(report["pending_blocks"], 256, "{report}");
        let status = lab.status();
        assert_eq!((&status["base"], status["base_root"].is_string()), (&uri.as_str().into(), sealed));
        lab.run("restore", NONE).ok();
        images::assert_equal(&lab.disk(), &new);
        lab.run("verify", NONE).ok();

        let base = lab.base();
        lab.run("rebase", &["--base", base.to_str().unwrap(), "--now"]).ok();
        lab.assert_pristine();
    }
}

/// What a session wrote is kept as an overlay on the export, which QEMU opens by the same URI.
#[test]
fn session_on_an_export_is_kept_as_an_overlay_on_it() {
    for kind in KINDS {
        let (lab, nbd) = served(kind, 0);
        provision(&lab, &nbd.uri(), NONE).ok();
        let server = lab.serve(NONE);
        let mut client = Remote::connected(&lab.socket(), 1);
        run(&mut lab.session("hold")).ok();
        client.ask("scatter 300 5");
        client.leave();
        wait_until("the disk is held", || lab.state_word() == "held");
        let kept = lab.path("kept.qcow2");
        lab.run("keep", &["--to", kept.to_str().unwrap()]).ok();
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-U", "-f", "qcow2", "-F", "raw"]).arg(&kept).arg(lab.disk());
        let said = run(&mut compare).ok().stdout;
        assert!(said.contains("identical"), "{said}");
        run(&mut lab.session("release")).ok();
        lab.wait_pristine();
        server.stop();
        lab.assert_pristine();
    }
}

/// All at once, too: what is copied at provision time, exact and with the export's holes.
#[test]
fn provision_copies_an_export_exactly_with_its_holes() {
    for kind in KINDS {
        let (lab, nbd) = served(kind, 0);
        provision(&lab, &nbd.uri(), NONE).ok();
        lab.assert_pristine();
        assert_eq!(lab.status()["base"], nbd.uri().as_str());
    }
}

/// Invariants 2 and 4, as an operator would see them: guests boot from a disk of which nothing was copied, out of an image that
/// `qemu-nbd` exports, spoil it, and leave it fresh, although the server is killed while it is being restored.
#[test]
fn guest_boots_from_an_export_and_leaves_it_fresh() {
    let lab = Lab::new();
    let tree = distribution::root_tree();
    images::ext4_of(&lab.base(), 160 << 20, tree.path());
    let expected = distribution::sum(tree.path());
    let mut nbd = NbdServer::start(Kind::QemuNbd, &lab.base(), RATE);
    provision(&lab, &nbd.uri(), &["--lazy"]).ok();
    let server = lab.serve(&["--base-timeout", "120"]);
    for session in 0..2 {
        let mut guest = Guest::boot_from_disk(&lab.socket(), Options::default());
        assert_eq!(guest.said("sum").split(' ').next(), Some(&*expected));
        guest.said("fresh");
        guest.finish();
        if session == 0 {
            nbd.kill();
            wait_until("the server is missed", || server.0.output().contains("connection lost"));
            nbd.start_again(&lab.base());
        }
    }
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine_bytes();
}

/// Who stops a command hears that it was stopped, and not that a base failed which it no longer waits for.
#[test]
fn seal_of_an_export_that_is_stopped_says_so() {
    let (lab, nbd) = served(Kind::Nbdkit, RATE);
    let manifest = lab.path("golden.manifest");
    let mut seal = pristine(["base", "seal"]);
    let mut process = Process::spawn("seal", seal.arg(nbd.uri()).arg("--base-manifest").arg(&manifest));
    wait_until("the manifest that is being made", || lab.path("golden.manifest.new").exists());
    process.signal(Signal::TERM);
    process.wait_line("what became of it", PATIENCE, |line| line.contains("stopped; nothing was changed"));
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    assert!(!process.output().contains("connection lost"), "{}", process.output());
    assert!(!manifest.exists() && !lab.path("golden.manifest.new").exists());
}

/// What can't be promoted is not compared first.
#[test]
fn promotion_on_an_export_is_refused_at_once() {
    let (lab, mut nbd) = served(Kind::Nbdkit, 0);
    provision(&lab, &nbd.uri(), NONE).ok();
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 100 1");
    run(&mut lab.session("hold")).ok();
    client.leave();
    wait_until("end of the session", || lab.status()["state"] == "held");
    server.stop();
    nbd.start_again(&lab.base());
    let to = lab.path("next.raw");
    lab.run("promote", &["--to", to.to_str().unwrap()])
        .refused(1, &["over the network", "pristine keep --disk"]);
    assert!(!to.exists());
}

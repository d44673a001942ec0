//! `pristine log show --map` and `log top`: where sessions wrote, with the names of what lies there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::{pristine, run};
use pristine_tests::remote::Remote;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const NONE: &[&str] = &[];

/// `pristine log WHAT --disk DISK`.
fn log(lab: &Lab, what: &str, more: &[&str]) -> Command {
    let mut command = pristine(["log", what, "--disk"]);
    command.arg(lab.disk()).args(more);
    command
}

/// The log of the first session, which comes after that of the provision.
fn session_log(lab: &Lab) -> PathBuf {
    let is_it = |log: &PathBuf| log.file_name().unwrap().to_str().unwrap().starts_with("00000002-");
    lab.logs().into_iter().find(is_it).unwrap()
}

/// What a real guest does to a disk with partitions and file systems is shown where it did it: for people, as SVG, and counted
/// over two sessions. With `PRISTINE_MAP_PICTURE=PATH` the picture is left there: docs/README.md.
#[test]
fn map_of_a_guests_sessions_names_the_partitions_that_it_wrote_to() {
    let lab = Lab::new();
    let partitions = [
        ("esp", MIB, 65 * MIB, None),
        ("root", 65 * MIB, 705 * MIB, Some("system")),
        ("home", 705 * MIB, 1023 * MIB, Some("home")),
    ];
    images::gpt(&lab.base(), 1024 * MIB, &partitions);
    lab.provision(&[]);
    let server = lab.serve(NONE);
    let script = "
        mount /dev/vda2 /mnt
        mkdir -p /mnt/var/log /mnt/var/cache /mnt/usr
        dd if=/dev/zero of=/mnt/var/cache/update bs=1M count=48 2>/dev/null
        sync
        for i in $(seq 60); do dd if=/dev/zero of=/mnt/usr/program$i bs=64k count=$((i % 7 + 1)) 2>/dev/null; done
        sync
        rm /mnt/var/cache/update
        for i in $(seq 20); do echo line $i >>/mnt/var/log/messages; sync; done
        umount /mnt
        mount /dev/vda3 /mnt
        dd if=/dev/zero of=/mnt/film bs=1M count=12 2>/dev/null
        echo notes >/mnt/notes
        umount /mnt
    ";
    Guest::boot(&lab.socket(), Options::default(), script).finish();
    lab.wait_pristine();

    let text = run(&mut log(&lab, "show", &["--map"])).ok().stdout;
    assert!(text.contains("session 2 of disk.img") && text.contains("1.00 GiB, GPT, 3 partitions"), "{text}");
    for name in [
        "1: esp  EFI system  64.00 MiB, written 0 B, 0.00 %",
        "2: system  ext4  640.00 MiB, written ",
        "3: home  ext4  318.00 MiB, written ",
    ] {
        assert!(text.contains(name), "no {name}: {text}");
    }
    assert!(text.contains('█'), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");

    let svg = lab.path("map.svg");
    let said = run(log(&lab, "show", &["--map", "--svg"]).arg(&svg)).ok().stdout;
    assert!(said.contains("map.svg: ") && said.contains("% of the disk"), "{said}");
    let picture = fs::read_to_string(&svg).unwrap();
    assert!(picture.contains("2: system</text>") && picture.contains("ext4</text>"), "{picture}");
    assert!(picture.len() < 60 << 10, "{}", picture.len());
    if let Some(path) = std::env::var_os("PRISTINE_MAP_PICTURE") {
        fs::copy(&svg, path).unwrap();
    }
    // It takes the place of its like, and of nothing else: a slip of the finger costs no disk and no device.
    run(log(&lab, "show", &["--map", "--svg"]).arg(&svg)).ok();
    let link = lab.path("link.svg");
    for precious in [lab.disk(), lab.base()] {
        let inode = fs::metadata(&precious).unwrap().ino();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        for path in [&precious, &link] {
            run(log(&lab, "show", &["--map", "--svg"]).arg(path)).refused(1, &["no picture", "another file"]);
        }
        assert_eq!(fs::metadata(&precious).unwrap().ino(), inode);
        fs::remove_file(&link).unwrap();
    }
    assert_eq!(run(&mut log(&lab, "show", &["--map", "--svg", "/dev/stdout"])).ok().stdout, picture);
    let redirected = lab.path("redirected.svg");
    let mut show = log(&lab, "show", &["--map", "--svg", "/dev/stdout"]);
    assert!(show.stdout(fs::File::create(&redirected).unwrap()).status().unwrap().success());
    assert_eq!(fs::read_to_string(redirected).unwrap(), picture);
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    run(log(&lab, "show", &["--map", "--svg"]).arg(&link)).ok();
    assert!(link.is_symlink());
    // The disk need not be there, nor the base: then there are no names.
    let newest = session_log(&lab);
    let named = run(pristine(["log", "show", "--map", "--base"]).arg(lab.base()).arg(&newest)).ok().stdout;
    assert_eq!(named, text.replace(" of disk.img", ""));
    let nameless = run(pristine(["log", "show", "--map"]).arg(&newest)).ok().stdout;
    assert!(nameless.contains("the disk") && !nameless.contains("system"), "{nameless}");

    // A second session, at one place of the first one's and at one where that was not.
    let (home, _) =
        lab.log_extents(&newest).into_iter().find(|(first, _)| first * 4096 >= 705 * MIB).unwrap();
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask(&format!("write {} 4096 1", home * 4096));
    client.ask(&format!("write {} 8192 1", 2 * MIB));
    client.leave();
    lab.wait_pristine();
    let top = run(&mut log(&lab, "top", &["--json"])).ok().stdout;
    let top: Value = serde_json::from_str(&top).unwrap();
    assert_eq!((&top["logs"], &top["block_size"]), (&json!(2), &json!(4096)));
    let extents = top["extents"].as_array().unwrap();
    let extent = |first, count, logs, name| json!({ "first": first, "count": count, "logs": logs, "partitions": [name] });
    // What is in most logs comes first.
    assert_eq!(extents[0], extent(home, 1, 2, "3: home"));
    assert!(extents.contains(&extent(2 * MIB / 4096, 2, 1, "1: esp")), "{extents:?}");
    let order = extents.iter().map(|extent| (extent["logs"].as_u64(), extent["count"].as_u64()));
    assert!(order.is_sorted_by(|a, b| a >= b));
    server.stop();
    lab.assert_pristine();
}

/// Over the logs of two disks of one base, by hand: which blocks are in both, in one, in none.
#[test]
fn top_counts_in_how_many_logs_each_extent_is() {
    let dir = Lab::new();
    let mut logs = Vec::new();
    for extents in [&[(10, 20), (100, 5)][..], &[(20, 20)]] {
        let lab = Lab::new();
        images::dense(&lab.base(), 8 * MIB, 3);
        lab.provision(&[]);
        let server = lab.serve(NONE);
        let mut client = Remote::connected(&lab.socket(), 1);
        for (first, count) in extents {
            client.ask(&format!("write {} {} 5", first * 4096, count * 4096));
        }
        client.leave();
        lab.wait_pristine();
        server.stop();
        let log = dir.path(&format!("{}.wlog", logs.len()));
        fs::copy(session_log(&lab), &log).unwrap();
        logs.push(log);
    }
    let said = run(pristine(["log", "top", "--json"]).args(&logs)).ok().stdout;
    let said: Value = serde_json::from_str(&said).unwrap();
    let expected: Vec<Value> = [(20, 10, 2), (10, 10, 1), (30, 10, 1), (100, 5, 1)]
        .into_iter()
        .map(|(first, count, logs)| json!({"first": first, "count": count, "logs": logs, "partitions": []}))
        .collect();
    assert_eq!(said["extents"], json!(expected));
    let table = run(pristine(["log", "top", "--count", "1"]).args(&logs)).ok().stdout;
    assert!(table.contains("in any   35 blocks") && table.contains("in all   10 blocks"), "{table}");
    assert!(table.contains("and 3 more extents"), "{table}");
    // A picture of both is of the blocks that are in any.
    let map = run(pristine(["log", "show", "--map"]).args(&logs)).ok().stdout;
    assert!(map.contains("2 logs") && map.contains("35 blocks"), "{map}");
}

/// Neither logs nor what is named beside them are believed: wrong files, and disks that do not fit, are one line.
#[test]
fn map_and_top_of_wrong_files_are_refused_in_one_line() {
    let lab = Lab::new();
    images::dense(&lab.base(), 8 * MIB, 4);
    lab.provision(&[]);
    for what in [&["log", "show", "--map"][..], &["log", "top"]] {
        run(pristine(what).arg(lab.base())).refused(1, &["base.img"]);
        run(pristine(what).arg(lab.path("nowhere"))).refused(1, &["nowhere"]);
        assert_eq!(run(&mut pristine(what)).code, Some(2));
    }
    // Nobody has had a session.
    run(&mut log(&lab, "show", &["--map"])).refused(1, &["no session"]);
    let svg = lab.path("no-such-directory/map.svg");
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 10 1");
    client.leave();
    lab.wait_pristine();
    server.stop();
    run(log(&lab, "show", &["--map", "--svg"]).arg(svg)).refused(1, &["map.svg"]);
    // A base that changed: what the log says can still be seen.
    images::dense(&lab.base(), 8 * MIB, 5);
    let map = run(&mut log(&lab, "show", &["--map"])).ok();
    assert!(map.stdout.contains("10 blocks") && map.stderr.contains("no names"), "{map:#?}");
}

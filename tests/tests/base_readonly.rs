//! The base image is only ever read.

use std::path::Path;
use std::process::Command;

use pristine_tests::PATIENCE;
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::process::Process;
use pristine_tests::program::run;
use pristine_tests::remote::Remote;

/// `command` under strace, which notes every call that opens a file or names one to change it.
fn traced(command: &Command, trace: &Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=%file,ftruncate,fallocate", "-o"]).arg(trace);
    strace.arg(command.get_program()).args(command.get_args());
    strace
}

/// The calls in `trace` that name `file`.
fn calls(trace: &Path, file: &Path) -> Vec<String> {
    let name = format!("\"{}\"", file.display());
    let text = std::fs::read_to_string(trace).unwrap();
    text.lines().filter(|line| line.contains(&name)).map(str::to_owned).collect()
}

/// Invariant 5: `provision`, `serve` with a session and its drain, `restore` and `verify` open the
/// base with O_RDONLY only, name it in no call that changes a file, and leave its bytes alone.
#[test]
fn base_is_opened_for_reading_only_by_every_command() {
    let lab = Lab::new();
    images::sparse(&lab.base(), 32 << 20, 71, &[(0, 8 << 20), (20 << 20, 4 << 20)]);
    let (hash, before) = (images::sha256(&lab.base()), std::fs::metadata(lab.base()).unwrap());
    let trace = |name: &str| lab.path(&format!("trace-{name}"));

    let base = lab.base().into_os_string();
    let provision = lab.pristine("provision", &["--base".into(), base, "--lazy".into()]);
    run(&mut traced(&provision, &trace("provision"))).ok();
    let mut serve = lab.pristine("serve", &["--once"]);
    serve.arg("--socket-path").arg(lab.socket());
    let mut server = Process::spawn("strace pristine serve", &traced(&serve, &trace("serve")));
    server.wait_line("\"listening\"", PATIENCE, |line| line.contains("listening"));
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 500 1");
    client.ask("read 0 65536");
    client.leave();
    assert!(server.wait(PATIENCE).success());
    for command in ["restore", "verify", "status"] {
        run(&mut traced(&lab.pristine(command, &[""; 0]), &trace(command))).ok();
    }

    for command in ["provision", "serve", "restore", "verify", "status"] {
        let calls = calls(&trace(command), &lab.base());
        let opens: Vec<_> = calls.iter().filter(|call| call.contains("open")).collect();
        assert!(command == "status" || !opens.is_empty(), "{command} never opened the base");
        for call in &opens {
            let harmless = call.contains("O_RDONLY") || call.contains("O_PATH");
            let changes = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"].iter().any(|flag| call.contains(flag));
            assert!(harmless && !changes, "{command}: {call}");
        }
        let changing =
            ["truncate(", "rename", "unlink", "link", "chmod(", "fchmodat", "chown", "utime", "setxattr"];
        let bad: Vec<_> = calls
            .iter()
            .filter(|call| changing.iter().any(|name| call.contains(&format!(" {name}"))))
            .collect();
        assert!(bad.is_empty(), "{command}: {bad:#?}");
    }
    lab.assert_pristine();
    let after = std::fs::metadata(lab.base()).unwrap();
    assert_eq!(images::sha256(&lab.base()), hash);
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
}

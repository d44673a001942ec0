//! An upgrade of the package under a running VM: SIGTERM, then the new program, by a service manager that
//! keeps descriptors over a restart.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::storm_binary;
use pristine_tests::service::ServiceManager;
use pristine_tests::{count_from_env, heavy, images, seed_from_env};

/// Starts a server as the service manager does.
fn serve(lab: &Lab, manager: &mut ServiceManager) -> Server {
    let mut command = lab.pristine("serve", &["--num-queues", "2"]);
    command.arg("--socket-path").arg(lab.socket());
    let (command, _fds) = manager.starts(&command);
    let server = Server::start(&command);
    manager.wait_for("READY=1");
    server
}

/// Invariant 3: a guest whose threads write and verify loses nothing, and its connection is not even
/// interrupted: QEMU is not told to connect again. A service manager keeps each open file once, and the guest's memory is
/// several regions of one.
#[test]
fn guest_under_an_upgrade_keeps_its_connection_and_loses_nothing() {
    let _alone = heavy();
    let (restarts, seed) = (count_from_env("PRISTINE_RESTARTS", 5), seed_from_env());
    let lab = Lab::new();
    images::sparse(&lab.base(), 96 << 20, 12, &[(0, 40 << 20), (64 << 20, 8 << 20)]);
    lab.provision(&["--lazy"]);
    let mut manager = ServiceManager::new().unwrap();
    let mut server = serve(&lab, &mut manager);
    let script = format!("guest-storm /dev/vda 8 {seed}");
    let programs = [("bin/guest-storm", storm_binary())];
    let programs = programs.each_ref().map(|(name, path)| (*name, path.as_path()));
    let options = Options { split: true, ..Options::default() };
    let mut guest = Guest::boot_with(&lab.socket(), options, &script, &programs);
    guest.said("storm");
    let (mut done, mut stalls) = (0, Vec::new());
    for _ in 0..restarts {
        done = guest.storms(done + 200).0;
        manager.listen_while(|| server.stop());
        assert!(manager.kept() > 2, "the connection was not kept");
        server = serve(&lab, &mut manager);
        assert_eq!(manager.kept(), 0, "it is not kept twice");
        let (now, worst) = guest.storms(done + 200);
        (done, stalls) = (now, [stalls, vec![worst]].concat());
        let output = server.0.output();
        assert!(output.contains("goes on") && !output.contains("turned away"), "{output}");
    }
    guest.type_line("enough");
    guest.said("storm-ok");
    guest.finish();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    println!("the slowest operation over each of {restarts} upgrades: {stalls:?} ms");
}

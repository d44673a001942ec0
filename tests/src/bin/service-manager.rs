//! A service manager for one service, in a machine that has none: starts the command that its arguments
//! are, and for each line on its standard input ends it and starts it again, with what it keeps. A line
//! `end` ends both.

use std::io::BufRead;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use pristine_tests::service::ServiceManager;
use rustix::process::{Pid, Signal, kill_process};

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let mut command = Command::new(arguments.next().expect("a command"));
    command.args(arguments);
    let mut manager = ServiceManager::new().unwrap();
    let mut service = start(&mut manager, &command);
    for line in std::io::stdin().lock().lines() {
        let begin = Instant::now();
        kill_process(Pid::from_child(&service), Signal::TERM).unwrap();
        let status = loop {
            // It may have more to say than is kept for a manager that does not listen.
            manager.listen();
            match service.try_wait().unwrap() {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let (kept, took) = (manager.kept(), begin.elapsed());
        println!("manager: the service has ended after {took:.2?}, {status}; {kept} descriptors are kept");
        if line.unwrap() == "end" {
            return;
        }
        service = start(&mut manager, &command);
    }
}

fn start(manager: &mut ServiceManager, command: &Command) -> Child {
    let begin = Instant::now();
    let (mut started, kept) = manager.starts(command);
    let service = started.spawn().unwrap();
    drop(kept);
    manager.wait_for("READY=1");
    println!("manager: after {:.2?} the service is ready", begin.elapsed());
    service
}

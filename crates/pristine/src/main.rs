//! `pristine`: non-persistent VM disks at native speed.
//!
//! This crate reads the command line, wires the other crates together and renders what they say. It
//! decides nothing about data.
#![forbid(unsafe_code)]

/// Prints a line. Whoever reads it may have gone: that is no reason to stop serving a guest.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, $($words)*).and_then(|()| out.flush());
    }};
}

mod affinity;
mod args;
mod base;
mod base_list;
mod commands;
mod control_socket;
mod copies;
mod failure;
mod keep;
mod logs;
mod notify;
mod progress;
mod promote;
mod rebase;
mod serve;
mod session;
mod signals;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse_from(args::with_default_command(std::env::args_os()));
    start_logger(cli.verbose);
    signals::survive_size_limits();
    let result = match &cli.command {
        Command::Provision(args) => commands::provision(args),
        Command::Serve(args) => serve::serve(args),
        Command::Maintain(args) => promote::maintain(args),
        Command::Promote(args) => promote::run(args),
        Command::Restore(args) => commands::restore(args),
        Command::Rebase(args) => rebase::run(args),
        Command::Verify(args) => commands::verify(args),
        Command::Status(args) => commands::status(args),
        Command::Base(args) => base::run(args),
        Command::Session(args) => session::run(args),
        Command::Keep(args) => keep::keep(args),
        Command::Log(args) => logs::run(args),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            let failure = failure.about(cli.command.disk_arguments().as_deref());
            let _ = writeln!(std::io::stderr(), "{failure}");
            failure.exit_code()
        }
    }
}

/// Warnings go to standard error; `-v` adds what is normal, `PRISTINE_LOG` takes env_logger's filters.
fn start_logger(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("PRISTINE_LOG", default))
        .format(|out, record| {
            let level = match record.level() {
                log::Level::Warn => "warning".to_string(),
                level => level.as_str().to_ascii_lowercase(),
            };
            writeln!(out, "pristine: {level}: {}", record.args())
        })
        .init();
}

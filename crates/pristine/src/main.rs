//! `pristine`: non-persistent VM disks at native speed.
//!
//! This crate reads the command line, wires the other crates together and renders what they say. It
//! decides nothing about data.
#![forbid(unsafe_code)]

/// Prints a line, as [`said::line`] does.
macro_rules! say {
    ($($words:tt)*) => { crate::said::line(format_args!($($words)*)) };
}

/// Prints what a server does, as [`said::news`] does.
macro_rules! announce {
    ($($words:tt)*) => { crate::said::news(format_args!($($words)*)) };
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
mod said;
mod serve;
mod session;
mod signals;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse_from(args::with_default_command(std::env::args_os()));
    start_logger(cli.verbose, said::is_server(&cli.command));
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
    match result.and_then(|code| said::all(&cli.command).map(|()| code)) {
        Ok(code) => code,
        Err(failure) => {
            let failure = failure.about(cli.command.disk_arguments().as_deref());
            let _ = writeln!(std::io::stderr(), "{failure}");
            failure.exit_code()
        }
    }
}

/// Warnings go to standard error; `-v` adds what is normal, `PRISTINE_LOG` takes env_logger's filters. `serves`: a reader
/// that does not read holds nothing up.
fn start_logger(verbose: u8, serves: bool) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let target = match serves {
        true => env_logger::Target::Pipe(Box::new(said::IfRead)),
        false => env_logger::Target::Stderr,
    };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("PRISTINE_LOG", default))
        .target(target)
        .format(|out, record| {
            let level = match record.level() {
                log::Level::Warn => "warning".to_string(),
                level => level.as_str().to_ascii_lowercase(),
            };
            writeln!(out, "pristine: {level}: {}", record.args())
        })
        .init();
}

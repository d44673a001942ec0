//! `session end`, `hold` and `release`: asked of the server that runs, or done to a disk without one.

use std::process::ExitCode;
use std::time::Duration;

use control::{Client, ClientError};
use indicatif::BinaryBytes;
use session_disk::{
    Changes, DiskOptions, Held, HoldReason, Manifest, SessionDisk, Status, left_open, server_of,
    set_hold_of_open_session,
};

use crate::args::{SessionArgs, SessionCommand};
use crate::commands::{amount, seconds};
use crate::copies;
use crate::failure::Failure;

const GOES_ON: &str = "`pristine restore` or the next `pristine serve` goes on";

pub(crate) fn run(args: &SessionArgs) -> Result<ExitCode, Failure> {
    let (SessionCommand::End(disk) | SessionCommand::Hold(disk) | SessionCommand::Release(disk)) =
        &args.command;
    let options = DiskOptions { changes: Changes::AsBefore, ..disk.options() };
    let name = options.disk.display().to_string();
    match (&args.command, client(&options)?) {
        (SessionCommand::End(_), Some(mut server)) => end(&name, &mut server)?,
        (SessionCommand::End(_), None) => end_offline(&name, &options)?,
        (SessionCommand::Hold(_), Some(mut server)) => hold(&name, &mut server)?,
        (SessionCommand::Hold(_), None) => hold_offline(&name, &options)?,
        (SessionCommand::Release(_), Some(mut server)) => release(&name, &mut server)?,
        (SessionCommand::Release(_), None) => release_offline(&name, &options)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A connection to the server of a disk, if one runs.
fn client(options: &DiskOptions) -> Result<Option<Client>, Failure> {
    // The socket is named by the disk's ID, which a copy of the disk has too: the live page knows better.
    let Some(server) = server_of(options)? else { return Ok(None) };
    let paths = options.paths();
    let socket = paths.control(Manifest::load(&paths)?.disk);
    match Client::connect(&socket)? {
        Some(client) => Ok(Some(client)),
        None => Err(Failure::new(format!(
            "{} is in use by process {}, which takes no commands at {}",
            options.disk.display(),
            server.pid,
            socket.display()
        ))
        .with_hint("wait until it is done, or stop it")),
    }
}

fn end(name: &str, client: &mut Client) -> Result<(), Failure> {
    let ended = client.session_end()?;
    say!(
        "{name}: session {} ended after {} ({}): {} written in {}",
        ended.sequence,
        seconds(Duration::from_millis(ended.duration_ms)),
        ended.reason,
        BinaryBytes(ended.bytes_written),
        amount(ended.dirty_blocks)
    );
    match ended.held {
        None => say!("{name}: {} to restore", amount(ended.pending_blocks)),
        Some(hold) => say!("{name}: {}", kept(ended.pending_blocks, &hold.message)),
    }
    Ok(())
}

fn end_offline(name: &str, options: &DiskOptions) -> Result<(), Failure> {
    let Some(sequence) = left_open(options)? else {
        return Err(Failure::new(format!("{name}: no session is open, and no server runs"))
            .with_hint("`pristine status` says how the disk is"));
    };
    // Taking a disk over ends what was left open.
    let disk = SessionDisk::open(options)?;
    let (pending, held) = (disk.pending_blocks(), disk.held());
    disk.stop()?;
    say!("{name}: session {sequence} ended, which a server that is gone had left open");
    match held {
        None => say!("{name}: {} to restore; {GOES_ON}", amount(pending)),
        Some(reason) => say!("{name}: {}", kept(pending, &reason.to_string())),
    }
    Ok(())
}

fn kept(blocks: u64, why: &str) -> String {
    format!("held {why}: {} are kept until `pristine session release`", amount(blocks))
}

fn hold(name: &str, client: &mut Client) -> Result<(), Failure> {
    let held = client.session_hold()?;
    say_held(name, held.already, held.session, held.blocks);
    Ok(())
}

fn hold_offline(name: &str, options: &DiskOptions) -> Result<(), Failure> {
    if Manifest::load(&options.paths())?.logs.is_empty() {
        // Without taking it over, which would change files.
        return Err(Failure::new(format!("{name}: there is nothing to hold: the disk is pristine")));
    }
    if let Some(held) = set_hold_of_open_session(options, Some(HoldReason::ByOperator))? {
        say_held(name, held.already, held.session, held.blocks);
        return Ok(());
    }
    let disk = SessionDisk::open(options)?;
    let held = disk.hold(HoldReason::ByOperator);
    disk.stop()?;
    let held = held?;
    say_held(name, held.already, held.session, held.blocks);
    Ok(())
}

fn say_held(name: &str, already: bool, session: Option<u64>, blocks: u64) {
    let already = if already { "already " } else { "" };
    match session {
        Some(sequence) => say!("{name}: {already}held from the end of session {sequence} on"),
        None => say!("{name}: {already}held; {} are kept until `pristine session release`", amount(blocks)),
    }
}

fn release(name: &str, client: &mut Client) -> Result<(), Failure> {
    let released = client.session_release()?;
    say_released(name, released.session, released.pending_blocks);
    Ok(())
}

fn say_released(name: &str, session: Option<u64>, pending: u64) {
    match session {
        Some(sequence) => say!("{name}: released; what session {sequence} writes is restored when it ends"),
        None => say!("{name}: released; {} to restore", amount(pending)),
    }
}

fn release_offline(name: &str, options: &DiskOptions) -> Result<(), Failure> {
    if Manifest::load(&options.paths())?.held.is_none() {
        return Err(Failure::new(format!("{name}: nothing is held")));
    }
    if let Some(Held { session: Some(session), .. }) = set_hold_of_open_session(options, None)? {
        say_released(name, Some(session), 0);
        return Ok(());
    }
    let disk = SessionDisk::open(options)?;
    // A hold for a process that is gone is over with that.
    let pending = match disk.held() {
        Some(_) => disk.release().map(|released| released.pending_blocks),
        None => Ok(disk.pending_blocks()),
    };
    disk.stop()?;
    say!("{name}: released; {} to restore; {GOES_ON}", amount(pending?));
    Ok(())
}

/// Adds to a status what only the server knows. One that does not answer is as good as none.
pub(crate) fn ask_server(options: &DiskOptions, status: &mut Status) {
    if status.server_pid.is_none() {
        return;
    }
    let ask = || -> Result<Option<control::Status>, Failure> {
        let Some(mut client) = client(options)? else { return Ok(None) };
        Ok(Some(client.status().map_err(|error: ClientError| Failure::of(&error))?))
    };
    match ask() {
        Ok(Some(told)) => {
            status.drain_error = told.drain.error;
            status.drain_next_attempt_unix_ms = told.drain.next_attempt_unix_ms;
            status.copies = told.drain.copies.map(copies::report);
        }
        Ok(None) => {}
        Err(failure) => log::info!("{}", failure.line()),
    }
}

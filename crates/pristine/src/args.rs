//! The command line.
// What is documented here is the text of `--help`, in which [] are what they are there.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use base_image::{BaseFormat, BaseLocation};
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use session_disk::{Changes, DiskOptions, FlushPolicy, NamedBase};
use vhost_blk::{Cpus, Polling};

use crate::affinity::QueueAffinity;
use crate::base_list::BaseListArgs;
use crate::copies::{DrainArgs, ReflinkArgs};
use crate::keep::{self, KeepArgs};
use crate::logs::LogArgs;
use crate::promote::{MAINTAIN_EXAMPLES, PROMOTE_EXAMPLES, PromoteArgs};
use crate::rebase::RebaseArgs;

/// Non-persistent VM disks at native speed: a vhost-user-blk backend.
///
/// Each guest has a full raw disk of its own. What it writes is logged by block number, and after its session just those
/// blocks get the base image's contents back.
#[derive(Debug, Parser)]
#[command(name = "pristine", version, propagate_version = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Say more; twice: say everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  pristine provision --base golden.raw --disk vm1.raw
  pristine serve --disk vm1.raw --socket-path /run/vm1.sock
  qemu-system-x86_64 -m 2G -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
      -chardev socket,id=c0,path=/run/vm1.sock -device vhost-user-blk-pci,chardev=c0,num-queues=2

Exit codes: 0 done, 1 not pristine or failed, 2 wrong usage.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a session disk from a base image
    #[command(after_help = "Examples:
  pristine provision --base golden.raw --disk vm1.raw
  pristine provision --base golden.raw --disk vm1.raw --lazy --size 40G
  pristine provision --base golden.raw --disk vm1.raw --reflink never
  pristine provision --base golden.raw --disk /dev/vg0/vm1 --state-dir /var/lib/pristine/vm1
  pristine provision --base golden.qcow2 --disk vm1.raw
  pristine provision --base debian-12.img --base-format qcow2 --disk vm1.raw
  pristine provision --base nbd://store/golden --base-manifest golden.manifest --disk vm1.raw --lazy

The format is decided once, here. A raw image is never taken for qcow2 because of how it begins: a guest may have written
that. A qcow2 image may lie on others (backing files) in its own directory, or in one named by --backing-dir; each must name
the format of the next.")]
    Provision(ProvisionArgs),
    /// Serve a session disk to VMs, one after the other
    #[command(after_help = "Examples:
  pristine serve --disk vm1.raw --socket-path /run/vm1.sock --num-queues 2
  pristine serve --disk vm1.raw --socket-path /run/vm1.sock --direct --once
  pristine serve --disk vm1.raw --socket-path /run/vm1.sock --drain idle --rate 50M
  pristine serve --disk vm1.raw --socket-path /run/vm1.sock --num-queues 2 --queue-affinity '0@[2],1@[3]'

Also understood without the word serve, as QEMU's conventions for backend programs have it:
  pristine --socket-path /run/vm1.sock --blk-file vm1.raw [--read-only]
  pristine --print-capabilities")]
    Serve(ServeArgs),
    /// Serve a session disk to VMs whose changes are kept: serve --reset-on never
    #[command(after_help = MAINTAIN_EXAMPLES, mut_arg("reset_on", |arg| arg.default_value("never").hide(true)))]
    Maintain(ServeArgs),
    /// Make the next generation of a base out of what kept sessions have changed on a disk
    #[command(after_help = PROMOTE_EXAMPLES)]
    Promote(PromoteArgs),
    /// Finish, offline, all that a crash or a stop left to be restored
    #[command(after_help = "Examples:
  pristine restore --disk vm1.raw && pristine verify --disk vm1.raw
  pristine restore --disk vm1.raw --discard-kept")]
    Restore(RestoreArgs),
    /// Move a disk to another generation of its base, or back
    #[command(after_help = crate::rebase::EXAMPLES)]
    Rebase(RebaseArgs),
    /// Compare a disk with its base: exit 0 if every byte is equal, else 1 and what differs
    #[command(after_help = "Examples:
  pristine verify --disk vm1.raw
  pristine verify --disk vm1.raw --json
  pristine verify --disk vm1.raw --deep")]
    Verify(VerifyArgs),
    /// Show what state a disk is in, also while it is served
    #[command(after_help = "Examples:
  pristine status --disk vm1.raw
  pristine status --disk vm1.raw --json

States: pristine, in-session, restoring (a server is at it), interrupted (restore or serve goes on), held (as the session
left it until `pristine session release`), kept (changed by sessions of `serve --reset-on never`).")]
    Status(ReportArgs),
    /// Seal base images, and look at them
    Base(BaseArgs),
    /// End a session, or keep what it leaves
    Session(SessionArgs),
    /// Keep what a session wrote, as a qcow2 image on the base: for forensics, for support, for a user's lost work
    #[command(after_help = keep::EXAMPLES)]
    Keep(KeepArgs),
    /// Look into write logs
    Log(LogArgs),
}

impl Command {
    /// How the disk was named, if it was, to be said again in a message.
    pub(crate) fn disk_arguments(&self) -> Option<String> {
        let (disk, dirs) = match self {
            Self::Provision(args) => (&args.disk.disk, &args.disk.dirs),
            Self::Serve(args) | Self::Maintain(args) => (args.disk.as_ref()?, &args.dirs),
            Self::Promote(args) => (&args.disk.disk, &args.disk.dirs),
            Self::Restore(RestoreArgs { disk, .. })
            | Self::Keep(KeepArgs { disk, .. })
            | Self::Rebase(RebaseArgs { disk, .. }) => (&disk.disk, &disk.dirs),
            Self::Verify(VerifyArgs { report, .. }) | Self::Status(report) => {
                (&report.disk.disk, &report.disk.dirs)
            }
            Self::Session(args) => match &args.command {
                SessionCommand::End(args) | SessionCommand::Hold(args) | SessionCommand::Release(args) => {
                    (&args.disk, &args.dirs)
                }
            },
            Self::Log(_) | Self::Base(_) => return None,
        };
        Some(disk_arguments(disk, dirs))
    }
}

/// Which disk, and where its state is.
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    /// The session disk: a raw file or a block device
    #[arg(long, alias = "blk-file", value_name = "DISK")]
    pub(crate) disk: PathBuf,
    #[command(flatten)]
    pub(crate) dirs: DirArgs,
}

/// How many retired logs a server keeps.
const KEEP_LOGS: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct DirArgs {
    /// Where manifest and logs are; of a device, a directory that outlasts a reboot [default: DISK.pristine]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// A directory on a tmpfs for what must survive a process but not the host; the same one for all commands
    /// [default: RUNTIME_DIRECTORY, which systemd sets; /run/pristine for root, else pristine under XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR")]
    pub(crate) runtime_dir: Option<PathBuf>,
    /// How many retired logs to keep for audit, while there is room for those that are needed [default: 8 of serve and maintain;
    /// other commands keep all]
    #[arg(long, value_name = "N")]
    pub(crate) keep_logs: Option<usize>,
    /// How long a read of an NBD base waits for its server, before it is an I/O error
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub(crate) base_timeout: u16,
}

/// How a disk is named, to be said again in a message.
pub(crate) fn disk_arguments(disk: &std::path::Path, dirs: &DirArgs) -> String {
    let state = dirs.state_dir.as_ref().map(|dir| format!(" --state-dir {}", dir.display()));
    format!("--disk {}{}", disk.display(), state.unwrap_or_default())
}

impl DiskArgs {
    pub(crate) fn options(&self) -> DiskOptions {
        disk_options(&self.disk, &self.dirs)
    }
}

fn disk_options(disk: &std::path::Path, dirs: &DirArgs) -> DiskOptions {
    DiskOptions {
        state_dir: dirs.state_dir.clone(),
        runtime_dir: dirs.runtime_dir.clone(),
        // Only who serves the disk knows how many are wanted where it is not said.
        keep_logs: dirs.keep_logs.unwrap_or(usize::MAX),
        base_patience: Duration::from_secs(dirs.base_timeout.into()),
        ..DiskOptions::new(disk)
    }
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) report: ReportArgs,
    /// Before that, compare the base with its seal, and name the chunks that are not as they were sealed
    #[arg(long)]
    pub(crate) deep: bool,
}

/// How a base is to be read.
#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// The base's format, raw or qcow2 [default: what was sealed; qcow2 if it is named *.qcow2 and begins as such; raw if nothing
    /// says otherwise; else it must be said]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) base_format: Option<BaseFormat>,
    /// A directory in which files may lie that a qcow2 base is backed by, besides the base's own; may be repeated
    #[arg(long, value_name = "DIR")]
    pub(crate) backing_dir: Vec<PathBuf>,
    /// Where the base's seal is [default: BASE.manifest; a base of an NBD server has none]
    #[arg(long, value_name = "FILE", visible_alias = "manifest")]
    pub(crate) base_manifest: Option<PathBuf>,
}

impl FormatArgs {
    /// `base`, as it is to be read.
    pub(crate) fn of(&self, base: &BaseLocation) -> NamedBase {
        NamedBase {
            location: base.clone(),
            seal: self.base_manifest.clone(),
            format: self.base_format,
            backing_dirs: self.backing_dir.clone(),
        }
    }
}

/// A path, or an NBD URI.
pub(crate) fn base_location() -> impl TypedValueParser<Value = BaseLocation> {
    PathBufValueParser::new().try_map(BaseLocation::try_from)
}

#[derive(Debug, Args)]
pub(crate) struct BaseArgs {
    #[command(subcommand)]
    pub(crate) command: BaseCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BaseCommand {
    /// Write BASE.manifest: the hash of each 64 KiB of the disk that the image makes, and one of them all
    ///
    /// Disks that are provisioned from the base afterwards take no byte of it that does not have its hash: what rots
    /// or is tampered with is an I/O error, not a guest's data. Disks with the same root hash (`pristine status`) have the same
    /// base, on whichever host and in whichever format. Seal again after every change.
    #[command(after_help = "Examples:
  pristine base seal golden.qcow2
  pristine base seal debian-12.img --base-format qcow2
  pristine base seal nbd://store/golden --base-manifest golden.manifest")]
    Seal(BaseImageArgs),
    /// Show a base's format, size, the files that it is made of, and its seal
    #[command(after_help = "Example:
  pristine base info golden.qcow2 --json")]
    Info(BaseImageArgs),
    /// Compare a base with its seal: exit 0 if all of it is as it was sealed, else 1 and the chunks that are not
    #[command(after_help = "Example:
  pristine base verify golden.qcow2")]
    Verify(BaseImageArgs),
    /// List the sealed bases in a directory: generations, each below the one that it was made of
    #[command(after_help = "Example:
  pristine base list --dir /srv/images")]
    List(BaseListArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BaseImageArgs {
    /// The base image: a file, a block device or an NBD URI
    #[arg(value_name = "BASE", value_parser = base_location())]
    pub(crate) base: BaseLocation,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ProvisionArgs {
    /// The base image: a raw file, a block device, a qcow2 image, or an export of an NBD server
    /// (nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=/PATH); it is never written
    #[arg(long, value_name = "BASE", value_parser = base_location())]
    pub(crate) base: BaseLocation,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// Copy nothing now: the disk can be served at once and is filled in the background. Nothing is reserved for it: a file system
    /// that is too full by then fails its guest's writes
    #[arg(long)]
    pub(crate) lazy: bool,
    /// Size of the disk, if larger than the base: bytes, or with K, M, G, T (powers of 1024); the tail
    /// is zeroes in every session
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// Take over an existing file, or a device that is not empty: all of its contents are replaced by the base's
    #[arg(long)]
    pub(crate) adopt: bool,
    #[command(flatten)]
    pub(crate) reflink: ReflinkArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// Give up, and restore, the changes that sessions of `serve --reset-on never` have made
    #[arg(long)]
    pub(crate) discard_kept: bool,
    #[command(flatten)]
    pub(crate) reflink: ReflinkArgs,
}

/// When a session's changes are given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResetOn {
    /// When its VM's process has ended
    Exit,
    /// Never: they are kept, and a guest's flush makes them durable
    Never,
}

/// Which engine does the I/O.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Engine {
    /// The one that suits the disk's file system and the kernel
    Auto,
    /// io_uring
    IoUring,
    /// Plain system calls: slower
    Sync,
}

/// What a guest's FLUSH does.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Flush {
    /// Nothing, as the session dies with the host anyway, but it fails where the kernel is known to have failed to
    /// write back what was written; with --reset-on never: fdatasync
    Auto,
    /// fdatasync of the session disk
    Always,
    /// Nothing
    Never,
}

impl From<Flush> for FlushPolicy {
    fn from(flush: Flush) -> Self {
        match flush {
            Flush::Auto => FlushPolicy::Auto,
            Flush::Always => FlushPolicy::Always,
            Flush::Never => FlushPolicy::Never,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The session disk: a raw file or a block device
    #[arg(
        long,
        visible_alias = "blk-file",
        value_name = "DISK",
        required_unless_present = "print_capabilities"
    )]
    pub(crate) disk: Option<PathBuf>,
    /// The vhost-user socket to make
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"])]
    pub(crate) socket_path: Option<PathBuf>,
    /// Instead of --socket-path: the number of an open descriptor, a listening or a connected socket
    #[arg(long, value_name = "FD", conflicts_with = "socket_path")]
    pub(crate) fd: Option<i32>,
    /// Queues that a VM may use
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) num_queues: u16,
    /// Entries that a queue may have, a power of two
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_queue_size)]
    pub(crate) queue_size: u16,
    /// Refuse all writes of guests
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Open the disk with O_DIRECT: it stays out of the host's page cache
    #[arg(long)]
    pub(crate) direct: bool,
    /// What does the I/O
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub(crate) engine: Engine,
    /// What a guest's flush does
    #[arg(long, value_enum, default_value_t = Flush::Auto)]
    pub(crate) flush: Flush,
    /// When a session's changes are given up; never: what was to be restored before is restored first, and `pristine
    /// restore --discard-kept` gives them up
    #[arg(long, value_enum, default_value_t = ResetOn::Exit)]
    pub(crate) reset_on: ResetOn,
    #[command(flatten)]
    pub(crate) drain: DrainArgs,
    #[command(flatten)]
    pub(crate) reflink: ReflinkArgs,
    /// Restore after the first session, then exit
    #[arg(long)]
    pub(crate) once: bool,
    /// How long a queue polls for more work before it sleeps: microseconds, up to 10000 (0: never), or auto: up to 50,
    /// as long as it pays and nobody else wants the core
    #[arg(long, value_name = "US|auto", default_value = "auto", value_parser = parse_polling)]
    pub(crate) poll_max_us: Polling,
    /// CPUs that the queues' threads may run on, such as 0-3,8 [default: where the process may]
    #[arg(long, value_name = "LIST")]
    pub(crate) cpus: Option<Cpus>,
    /// CPUs of single queues, such as 0@[0,2],1@[1,3-5]; others have those of --cpus. Their threads are called
    /// pristine-q0 and so on
    #[arg(long, value_name = "QUEUE@[LIST],...")]
    pub(crate) queue_affinity: Option<QueueAffinity>,
    /// How long another VM waits for a session whose VM went away but whose process still runs, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub(crate) reconnect_grace: u32,
    /// Access mode of the socket, octal [default: 0600]
    #[arg(long, value_name = "MODE", value_parser = parse_mode, conflicts_with = "fd")]
    pub(crate) socket_mode: Option<u32>,
    /// User ID that is to own the socket
    #[arg(long, value_name = "UID", conflicts_with = "fd")]
    pub(crate) socket_owner: Option<u32>,
    /// Group ID that is to own the socket
    #[arg(long, value_name = "GID", conflicts_with = "fd")]
    pub(crate) socket_group: Option<u32>,
    /// Print the capabilities of this backend program as JSON, and exit
    #[arg(long)]
    pub(crate) print_capabilities: bool,
    #[command(flatten)]
    pub(crate) dirs: DirArgs,
}

impl ServeArgs {
    pub(crate) fn options(&self, disk: &std::path::Path) -> DiskOptions {
        DiskOptions {
            direct: self.direct,
            engine: match self.engine {
                Engine::Auto => None,
                Engine::IoUring => Some(blockio::EngineKind::IoUring),
                Engine::Sync => Some(blockio::EngineKind::Sync),
            },
            flush: self.flush.into(),
            changes: match self.reset_on {
                ResetOn::Exit => Changes::Reset,
                ResetOn::Never => Changes::Keep,
            },
            resume: true,
            drain: self.drain.policy(),
            reflink: self.reflink.allowed(),
            keep_logs: self.dirs.keep_logs.unwrap_or(KEEP_LOGS),
            ..disk_options(disk, &self.dirs)
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct SessionArgs {
    #[command(subcommand)]
    pub(crate) command: SessionCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SessionCommand {
    /// End the session that is open: its VM is disconnected, what it wrote is restored
    ///
    /// Where no server runs, the session that a dead one left open is ended; `pristine restore` or the next
    /// `pristine serve` then goes on.
    #[command(after_help = "Example:
  pristine session end --disk vm1.raw")]
    End(DiskArgs),
    /// Keep the disk as its session leaves it: nothing is restored, no session begins
    ///
    /// The hold begins when the open session ends; without one, at once, as long as nothing of the last session was
    /// restored. It is durable: it outlasts servers and hosts until `pristine session release`.
    #[command(after_help = "Examples:
  pristine session hold --disk vm1.raw
  pristine session hold --disk vm1.raw && pristine session end --disk vm1.raw")]
    Hold(DiskArgs),
    /// End a hold: what was kept is restored, sessions may begin
    #[command(after_help = "Example:
  pristine session release --disk vm1.raw")]
    Release(DiskArgs),
}

/// The arguments with the word `serve` where QEMU's conventions leave it out.
pub(crate) fn with_default_command(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const SERVE_OPTIONS: [&str; 5] =
        ["--socket-path", "--fd", "--print-capabilities", "--blk-file", "--read-only"];
    let mut args: Vec<OsString> = args.collect();
    let first = args.get(1).and_then(|arg| arg.to_str()).unwrap_or_default();
    let name = first.split('=').next().unwrap_or_default();
    if SERVE_OPTIONS.contains(&name) {
        args.insert(1, "serve".into());
    }
    args
}

/// The size of a disk.
fn parse_size(text: &str) -> Result<u64, String> {
    let size = parse_bytes(text)?;
    blocks::Geometry::new(size).map(blocks::Geometry::size).map_err(|error| error.to_string())
}

/// A number of bytes, or one with a suffix of powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        suffix => return Err(format!("unknown suffix {suffix}, expected K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a number, such as 40G".to_string())?;
    Ok(number.checked_mul(1 << shift).ok_or("too large")?)
}

fn parse_polling(text: &str) -> Result<Polling, String> {
    match (text, text.parse::<u64>()) {
        ("auto", _) => Ok(Polling::Auto),
        (_, Ok(micros @ 0..=10_000)) => Ok(Polling::Fixed(Duration::from_micros(micros))),
        _ => Err("expected microseconds from 0 to 10000, or auto".into()),
    }
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (2..=1024).contains(&size) => Ok(size),
        _ => Err("expected a power of two from 2 to 1024".into()),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "expected an octal mode, such as 0660".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_with_suffixes_are_bytes() {
        assert_eq!(parse_size("40G"), Ok(40 << 30));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("513").is_err() && parse_size("1X").is_err() && parse_size("G").is_err());
        assert!(parse_size("99999999999T").is_err());
    }

    #[test]
    fn arguments_without_the_word_serve_mean_serve() {
        let args = |words: &[&str]| -> Vec<OsString> {
            with_default_command(words.iter().map(|word| OsString::from(*word)))
        };
        assert_eq!(args(&["p", "--blk-file=x"])[1], "serve");
        assert_eq!(args(&["p", "--print-capabilities"])[1], "serve");
        assert_eq!(args(&["p", "status"]).len(), 2);
        assert_eq!(args(&["p", "--help"]).len(), 2);
    }
}

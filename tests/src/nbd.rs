//! NBD servers as operators run them, that can be killed and started again at the same place.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::process::Process;
use crate::program::run;
use crate::wait_until;

/// Which program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `qemu-nbd`, at a TCP port.
    QemuNbd,
    /// `nbdkit`, at a Unix socket.
    Nbdkit,
}

/// Both.
pub const KINDS: [Kind; 2] = [Kind::QemuNbd, Kind::Nbdkit];

/// A directory with an authority's certificate, and a server's and a client's of it, named as QEMU, nbdkit and pristine
/// look for them.
#[derive(Debug)]
pub struct Certificates(TempDir);

impl Certificates {
    /// New ones, that nobody else knows.
    pub fn new(server_name: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("pc").tempdir().unwrap();
        let openssl = |args: &str| {
            run(Command::new("openssl").args(args.split(' ')).current_dir(dir.path())).ok();
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        openssl(&format!("req -x509 {key} -keyout ca-key.pem -out ca-cert.pem -days 3 -subj /CN=authority"));
        std::fs::write(dir.path().join("names"), format!("subjectAltName=DNS:{server_name}\n")).unwrap();
        for who in ["server", "client"] {
            openssl(&format!("req {key} -keyout {who}-key.pem -out {who}.csr -subj /CN={who}"));
            let authority = "-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 3 -extfile names";
            openssl(&format!("x509 -req -in {who}.csr {authority} -out {who}-cert.pem"));
        }
        Self(dir)
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        self.0.path()
    }
}

/// A server of one image, read-only. Goes with its owner.
#[derive(Debug)]
pub struct NbdServer {
    kind: Kind,
    dir: TempDir,
    port: u16,
    /// Bytes per second that it reads of the image; 0: as many as it can.
    rate: u64,
    /// For a server that takes only connections with TLS, and `qemu-nbd` only of clients with a certificate.
    certificates: Option<Certificates>,
    process: Option<Process>,
}

impl NbdServer {
    /// Serves the raw `image`, at most `rate` bytes of it per second if that is not 0.
    pub fn start(kind: Kind, image: &Path, rate: u64) -> Self {
        Self::prepared(kind, image, rate, None)
    }

    /// The same, with TLS.
    pub fn with_tls(kind: Kind, image: &Path, certificates: Certificates) -> Self {
        Self::prepared(kind, image, 0, Some(certificates))
    }

    fn prepared(kind: Kind, image: &Path, rate: u64, certificates: Option<Certificates>) -> Self {
        let dir = tempfile::Builder::new().prefix("pn").tempdir().unwrap();
        // The kernel gives away a port that was just free last of all.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self { kind, dir, port, rate, certificates, process: None };
        server.run(image);
        server
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// How `pristine` names it.
    pub fn uri(&self) -> String {
        match self.kind {
            Kind::QemuNbd => format!("nbd://127.0.0.1:{}/golden", self.port),
            Kind::Nbdkit => format!("nbd+unix:///golden?socket={}", self.socket().display()),
        }
    }

    /// `kill -9`; returns when it is gone.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Stops it (SIGSTOP): connections stay, and nothing is answered.
    pub fn freeze(&self) {
        if let Some(process) = &self.process {
            process.freeze();
        }
    }

    /// Starts it again, at the same place, perhaps with another image, and as fast as it can.
    pub fn start_again(&mut self, image: &Path) {
        self.kill();
        self.rate = 0;
        self.run(image);
    }

    fn run(&mut self, image: &Path) {
        let command = match self.kind {
            Kind::QemuNbd => self.qemu_nbd(image),
            Kind::Nbdkit => self.nbdkit(image),
        };
        let name = command.get_program().to_string_lossy().into_owned();
        let mut process = Process::spawn(&name, &command);
        wait_until("the NBD server listens", || {
            assert!(!process.ended(), "{name} has ended: {}", process.output());
            match self.kind {
                Kind::QemuNbd => TcpStream::connect(("127.0.0.1", self.port)).is_ok(),
                Kind::Nbdkit => UnixStream::connect(self.socket()).is_ok(),
            }
        });
        self.process = Some(process);
    }

    fn qemu_nbd(&self, image: &Path) -> Command {
        let mut command = Command::new("qemu-nbd");
        command.args(["--read-only", "--persistent", "--shared=0", "--export-name=golden"]);
        command.args(["--bind=127.0.0.1", &format!("--port={}", self.port)]);
        if let Some(certificates) = &self.certificates {
            let dir = certificates.dir().display();
            let object = format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={dir}");
            command.args(["--object", &object, "--tls-creds=tls"]);
        }
        if self.rate == 0 {
            command.arg("--format=raw").arg(image);
        } else {
            let object = format!("throttle-group,id=limit,x-bps-read={}", self.rate);
            let file =
                format!("file.driver=raw,file.file.driver=file,file.file.filename={}", image.display());
            command.args(["--object", &object, "--image-opts"]);
            command.arg(format!("driver=throttle,throttle-group=limit,{file}"));
        }
        command
    }

    fn nbdkit(&self, image: &Path) -> Command {
        let _ = std::fs::remove_file(self.socket());
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--readonly", "--unix"]).arg(self.socket());
        if let Some(certificates) = &self.certificates {
            command.arg("--tls=require").arg(format!("--tls-certificates={}", certificates.dir().display()));
        }
        if self.rate > 0 {
            command.arg("--filter=rate");
        }
        command.arg("file").arg(image);
        if self.rate > 0 {
            command.arg(format!("rate={}", self.rate * 8));
        }
        command
    }
}

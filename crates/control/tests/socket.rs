//! The control socket: what clients can ask for, and what they can't do to it or to each other.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use control::{
    CLIENTS_MAX, Client, ClientError, ControlServer, DrainStatus, ErrorKind, Handler, REQUEST_BYTES_MAX,
    Refusal, Reply, SessionEnded, SessionHeld, SessionReleased, Status,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A program whose `session end` takes as long as the test wants.
#[derive(Default)]
struct Program {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ends_wait: bool,
    ending: usize,
}

impl Program {
    fn let_ends_wait(&self, wait: bool) {
        self.state.lock().unwrap().ends_wait = wait;
        self.changed.notify_all();
    }

    /// Waits until `count` commands are being carried out.
    fn wait_for_ends(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (_state, timeout) =
            self.changed.wait_timeout_while(state, PATIENCE, |state| state.ending < count).unwrap();
        assert!(!timeout.timed_out());
    }
}

impl Handler for Program {
    fn status(&self) -> Result<Status, Refusal> {
        Ok(Status {
            server_pid: std::process::id(),
            session: None,
            dirty_blocks: 1,
            pending_blocks: 2,
            block_size: 4096,
            held: None,
            drain: DrainStatus {
                error: Some("no \"base\"\n".into()),
                next_attempt_unix_ms: Some(3),
                copies: None,
            },
        })
    }

    fn session_end(&self) -> Result<SessionEnded, Refusal> {
        let mut state = self.state.lock().unwrap();
        state.ending += 1;
        self.changed.notify_all();
        while state.ends_wait {
            state = self.changed.wait(state).unwrap();
        }
        state.ending -= 1;
        Err(Refusal::new(ErrorKind::Refused, "no session is open"))
    }

    fn session_hold(&self) -> Result<SessionHeld, Refusal> {
        Ok(SessionHeld { already: false, session: Some(4), blocks: 5 })
    }

    fn session_release(&self) -> Result<SessionReleased, Refusal> {
        Ok(SessionReleased { session: None, pending_blocks: 6 })
    }
}

struct Bench {
    dir: tempfile::TempDir,
    program: Arc<Program>,
    server: Option<ControlServer>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = Arc::new(Program::default());
        let server = ControlServer::start(&dir.path().join("s"), program.clone()).unwrap();
        Self { dir, program, server: Some(server) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path()).unwrap().unwrap()
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn say(mut stream: &UnixStream, bytes: &[u8]) -> Reply {
    stream.write_all(bytes).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

fn kind(reply: Reply) -> ErrorKind {
    reply.error.unwrap().kind
}

/// Whether the connection ends, after what may be left of replies.
fn is_over(mut stream: &UnixStream) -> bool {
    loop {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

const STATUS: &[u8] = b"{\"version\":1,\"command\":\"status\"}\n";
const END: &[u8] = b"{\"version\":1,\"command\":\"session end\"}\n";

#[test]
fn client_gets_what_the_program_answers() {
    let bench = Bench::new();
    let mut client = bench.client();
    let status = client.status().unwrap();
    assert_eq!((status.server_pid, status.pending_blocks), (std::process::id(), 2));
    assert_eq!(status.drain.error.as_deref(), Some("no \"base\"\n"));
    assert_eq!(client.session_hold().unwrap(), SessionHeld { already: false, session: Some(4), blocks: 5 });
    assert_eq!(client.session_release().unwrap().pending_blocks, 6);
    let refused = client.session_end();
    assert!(
        matches!(&refused, Err(ClientError::Refused(why)) if why.kind == ErrorKind::Refused),
        "{refused:?}"
    );
}

#[test]
fn socket_is_for_its_owner_alone() {
    let bench = Bench::new();
    assert_eq!(std::fs::metadata(bench.path()).unwrap().permissions().mode() & 0o7777, 0o600);
}

#[test]
fn request_that_is_wrong_is_answered_and_the_next_one_served() {
    let bench = Bench::new();
    let stream = bench.raw();
    let wrong: [(&[u8], ErrorKind); 6] = [
        (b"\n", ErrorKind::BadRequest),
        (b"\xff\xfe\n", ErrorKind::BadRequest),
        (b"{\"version\":1,\"command\":\"status\",\"verbose\":true}\n", ErrorKind::BadRequest),
        (b"{\"version\":1,\"command\":\"session\"}\n", ErrorKind::UnknownCommand),
        (b"{\"version\":2,\"command\":\"status\"}\n", ErrorKind::UnknownVersion),
        (b"{\"command\":\"status\"}\n", ErrorKind::BadRequest),
    ];
    for (request, expected) in wrong {
        assert_eq!(kind(say(&stream, request)), expected, "{}", String::from_utf8_lossy(request));
    }
    assert!(say(&stream, STATUS).result.is_some());
}

#[test]
fn request_that_is_too_long_or_cut_off_ends_its_connection() {
    let bench = Bench::new();
    let stream = bench.raw();
    assert_eq!(kind(say(&stream, &vec![b'['; REQUEST_BYTES_MAX + 1])), ErrorKind::TooLong);
    assert!(is_over(&stream));
    let stream = bench.raw();
    (&stream).write_all(&STATUS[..STATUS.len() - 1]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(kind(say(&stream, b"")), ErrorKind::BadRequest);
    assert!(is_over(&stream));
}

/// Silent clients, those that stop in the middle of a request and those that take no replies keep
/// nobody waiting: the next one is answered at once, in the place of who has been idle for longest.
#[test]
fn client_beside_as_many_silent_ones_as_there_can_be_is_answered() {
    let bench = Bench::new();
    let mut silent: Vec<UnixStream> = Vec::new();
    for number in 0..CLIENTS_MAX * 3 {
        let stream = bench.raw();
        match number % 3 {
            0 => {}
            1 => (&stream).write_all(&STATUS[..5]).unwrap(),
            _ => {
                // As many replies as fit into the socket, and more.
                stream.set_nonblocking(true).unwrap();
                let many = STATUS.repeat(2000);
                let _ = (&stream).write(&many);
                stream.set_nonblocking(false).unwrap();
            }
        }
        silent.push(stream);
        let begin = Instant::now();
        bench.client().status().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(5), "client {number} waited {:?}", begin.elapsed());
    }
    // A client each time: the first ones have lost their places.
    assert!(is_over(&silent[0]));
}

/// A command that takes long keeps no other client waiting, and its client is not thrown out.
#[test]
fn client_beside_one_whose_command_takes_long_is_answered() {
    let bench = Bench::new();
    bench.program.let_ends_wait(true);
    let waiting: Vec<UnixStream> = (1..CLIENTS_MAX).map(|_| bench.raw()).collect();
    waiting.iter().for_each(|mut stream| stream.write_all(END).unwrap());
    bench.program.wait_for_ends(CLIENTS_MAX - 1);
    for _ in 0..CLIENTS_MAX {
        bench.client().status().unwrap();
    }
    let last = bench.raw();
    (&last).write_all(END).unwrap();
    bench.program.wait_for_ends(CLIENTS_MAX);
    // All places are taken by commands: said, not waited for.
    assert_eq!(kind(say(&bench.raw(), b"")), ErrorKind::Busy);
    bench.program.let_ends_wait(false);
    waiting.iter().chain([&last]).for_each(|stream| assert_eq!(kind(say(stream, b"")), ErrorKind::Refused));
}

#[test]
fn server_that_stops_answers_what_it_has_begun_and_removes_its_socket() {
    let mut bench = Bench::new();
    bench.program.let_ends_wait(true);
    let (begun, idle) = (bench.raw(), bench.raw());
    (&begun).write_all(END).unwrap();
    bench.program.wait_for_ends(1);
    let server = bench.server.take();
    let stopping = std::thread::spawn(move || drop(server));
    // Disconnected: the server is stopping.
    assert!(is_over(&idle));
    bench.program.let_ends_wait(false);
    assert_eq!(kind(say(&begun, b"")), ErrorKind::Refused);
    stopping.join().unwrap();
    assert!(!bench.path().exists());
    assert!(Client::connect(&bench.path()).unwrap().is_none());
}

/// Invariant 7 for the socket: a living server's is left alone, a dead one's is replaced.
#[test]
fn socket_of_a_living_server_is_refused_and_a_dead_ones_replaced() {
    let bench = Bench::new();
    let second = ControlServer::start(&bench.path(), bench.program.clone());
    assert!(matches!(second, Err(unix_socket::SocketError::Taken { .. })), "{second:?}");
    bench.client().status().unwrap();
    let dead = bench.dir.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    assert!(Client::connect(&dead).unwrap().is_none());
    let inode = std::fs::metadata(&dead).unwrap().ino();
    let server = ControlServer::start(&dead, bench.program.clone()).unwrap();
    assert!(Client::connect(&dead).unwrap().is_some());
    drop(server);
    assert!(!dead.exists() || std::fs::metadata(&dead).unwrap().ino() != inode);
}

/// A runtime directory may have any name; `sun_path` has room for 107 bytes of it.
#[test]
fn socket_with_a_long_path_is_made_and_found_and_removed() {
    let bench = Bench::new();
    let deep = bench.dir.path().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    let path = deep.join("0c0ffee0-0000-4000-8000-000000000000.control");
    assert!(Client::connect(&path).unwrap().is_none());
    let server = ControlServer::start(&path, bench.program.clone()).unwrap();
    Client::connect(&path).unwrap().unwrap().status().unwrap();
    drop(server);
    assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 0);
}

#[test]
fn server_that_does_not_answer_is_not_waited_for_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _silent = UnixListener::bind(&path).unwrap();
    let error = Client::connect(&path).unwrap().unwrap().status().unwrap_err();
    assert!(matches!(error, ClientError::NoAnswer { seconds: 5, .. }), "{error:?}");
    assert!(
        error.to_string().ends_with("has not answered for 5 s; what it was asked for goes on"),
        "{error}"
    );
}

#[test]
fn reply_that_is_none_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let ask = |answer: &'static [u8]| {
        let path: &Path = &dir.path().join("s");
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            BufReader::new(&stream).read_line(&mut String::new()).unwrap();
            let _ = stream.write_all(answer);
        });
        let result = Client::connect(path).unwrap().unwrap().status();
        server.join().unwrap();
        result
    };
    for answer in [&b""[..], b"{", b"{}\n", b"{\"version\":1,\"result\":{}}\n", b"\0\n"] {
        let result = ask(answer);
        assert!(matches!(result, Err(ClientError::BadReply { .. })), "{answer:?}: {result:?}");
    }
}

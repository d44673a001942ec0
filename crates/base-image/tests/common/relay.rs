//! A way to a server over TCP that can fall silent.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use socket2::{SockFilter, SockRef};

/// Takes connections and leads each to the server at a Unix socket.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    taken: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    pub(crate) fn to(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let taken = Arc::new(Mutex::new(Vec::new()));
        let relay = Self { address, taken: Arc::clone(&taken) };
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), UnixStream::connect(&socket).unwrap());
                taken.lock().unwrap().push(client.try_clone().unwrap());
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || copy(from, to));
                thread::spawn(move || {
                    copy(server, &client);
                    // Who waits for the other direction too.
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        relay
    }

    /// Nothing arrives any more over the connections that there are, nobody is told, and no host says that it is not so: as
    /// when something on the way has forgotten them. Returns how many there have been.
    pub(crate) fn fall_silent(&self) -> usize {
        let taken = self.taken.lock().unwrap();
        for client in taken.iter() {
            // bpf(4) without packets: "return 0", of each segment nothing is kept.
            SockRef::from(client).attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]).unwrap();
        }
        taken.len()
    }
}

fn copy(mut from: impl std::io::Read, mut to: impl std::io::Write) {
    let _ = std::io::copy(&mut from, &mut to);
}

//! NBD URIs, as `doc/uri.md` of the NBD project has them, as far as they can be kept for later: names of
//! sockets and directories must be absolute, and what is not understood is refused.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port that is meant where none is named.
const PORT: u16 = 10809;

const SCHEMES: [(&str, bool, bool); 4] = [
    // Name, over a Unix socket, with TLS.
    ("nbd", false, false),
    ("nbds", false, true),
    ("nbd+unix", true, false),
    ("nbds+unix", true, true),
];

/// Which export of which server, as an operator writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    text: String,
    pub(super) server: Server,
    pub(super) tls: Option<Tls>,
    pub(super) export: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// Host name or address, and port.
    Tcp(String, u16),
    /// A socket's path.
    Unix(PathBuf),
}

/// How a server proves itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tls {
    /// The name that its certificate must have.
    pub(super) name: String,
    /// The directory with `ca-cert.pem`, and perhaps `client-cert.pem` and `client-key.pem`; `None`: whom the system
    /// trusts.
    pub(super) certificates: Option<PathBuf>,
}

impl NbdUri {
    /// Whether `text` is meant as such a URI, right or wrong.
    pub fn is_meant(text: &str) -> bool {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| scheme.starts_with("nbd") && !scheme.contains('/'))
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for NbdUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).map_err(|what| format!("{text}: {what}"))
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("it is not a URI")?;
    let Some((_, unix, tls)) = SCHEMES.into_iter().find(|(name, ..)| *name == scheme) else {
        return Err(format!(
            "{scheme}:// is not known, expected nbd://, nbds://, nbd+unix:// or nbds+unix://"
        ));
    };
    if rest.contains('#') {
        return Err("it has a fragment (#), which names nothing here; write %23 in an export's name".into());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let mut parameters = Parameters::default();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').ok_or("a parameter has no value")?;
        parameters.set(name, decode(value)?)?;
    }
    let server = match (unix, parameters.socket) {
        (true, Some(socket)) if authority.is_empty() => Server::Unix(socket),
        (true, Some(_)) => return Err("it names both a host and a socket".into()),
        (true, None) => return Err("it names no socket; write nbd+unix:///EXPORT?socket=/PATH".into()),
        (false, Some(_)) => return Err("a socket is for nbd+unix://".into()),
        (false, None) => {
            let (host, port) = host_and_port(authority)?;
            Server::Tcp(host, port)
        }
    };
    let tls = match (tls, parameters.certificates, parameters.hostname) {
        (false, None, None) => None,
        (false, ..) => return Err("it has TLS parameters; write nbds:// for TLS".into()),
        (true, certificates, hostname) => {
            let name = hostname.or_else(|| match &server {
                Server::Tcp(host, _) => Some(host.clone()),
                Server::Unix(_) => None,
            });
            let name =
                name.ok_or("no name to look for in the server's certificate; add tls-hostname=NAME")?;
            Some(Tls { name, certificates })
        }
    };
    Ok(NbdUri { text: text.to_owned(), server, tls, export: decode(export)? })
}

#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    certificates: Option<PathBuf>,
    hostname: Option<String>,
}

impl Parameters {
    fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        match name {
            "socket" => self.socket = Some(absolute(name, value)?),
            "tls-certificates" => self.certificates = Some(absolute(name, value)?),
            "tls-hostname" => self.hostname = Some(value),
            "tls-type" if value == "x509" => {}
            "tls-verify-peer" if value == "1" => {}
            "tls-type" => return Err(format!("tls-type={value} is not supported, only x509 is")),
            "tls-verify-peer" => return Err("a server that proves nothing is not trusted with a base".into()),
            _ => {
                return Err(format!(
                    "the parameter {name} is not known, expected socket, tls-certificates or tls-hostname"
                ));
            }
        }
        Ok(())
    }
}

/// A path that means the same in whatever directory a server is started.
fn absolute(name: &str, value: String) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    if path.is_absolute() { Ok(path) } else { Err(format!("{name} needs an absolute path")) }
}

fn host_and_port(authority: &str) -> Result<(String, u16), String> {
    if authority.contains('@') {
        return Err("it has a user name, which is for pre-shared keys; they are not supported".into());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("the bracket of its address is not closed")?;
            (
                host,
                rest.strip_prefix(':')
                    .or(rest.is_empty().then_some(""))
                    .ok_or("what follows the address is no port")?,
            )
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let port = match port {
        "" => PORT,
        port => port.parse().map_err(|_| format!("{port} is no port; an IPv6 address needs brackets"))?,
    };
    if host.is_empty() {
        return Err("it names no host".into());
    }
    Ok((decode(host)?, port))
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err("a % is not followed by two hexadecimal digits".into()),
        }
    }
    if bytes.contains(&0) {
        return Err("a zero byte names nothing".into());
    }
    String::from_utf8(bytes).map_err(|_| "what it names is not text".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Server, String) {
        let uri: NbdUri = text.parse().unwrap();
        assert_eq!((uri.as_str(), &uri.tls), (text, &None));
        (uri.server, uri.export)
    }

    #[test]
    fn uris_of_the_standard_name_server_and_export() {
        let tcp = |host: &str, port| Server::Tcp(host.into(), port);
        for (text, server, export) in [
            ("nbd://example.com", tcp("example.com", 10809), ""),
            ("nbd://example.com/", tcp("example.com", 10809), ""),
            ("nbd://example.com:10810/disk", tcp("example.com", 10810), "disk"),
            ("nbd://example.com//disk", tcp("example.com", 10809), "/disk"),
            ("nbd://example.com/hello%20world", tcp("example.com", 10809), "hello world"),
            ("nbd://[::1]/x", tcp("::1", 10809), "x"),
            ("nbd://[::1]:77/x", tcp("::1", 77), "x"),
            ("nbd+unix:///disk?socket=/run/a%2bb", Server::Unix("/run/a+b".into()), "disk"),
        ] {
            assert_eq!(parsed(text), (server, export.to_owned()), "{text}");
        }
    }

    #[test]
    fn uri_with_tls_names_whose_certificate_and_whom_to_trust() {
        let uri: NbdUri = "nbds://store/golden?tls-certificates=/etc/pki/pristine".parse().unwrap();
        assert_eq!(
            uri.tls,
            Some(Tls { name: "store".into(), certificates: Some("/etc/pki/pristine".into()) })
        );
        let uri: NbdUri = "nbds+unix:///?socket=/s&tls-hostname=store&tls-type=x509".parse().unwrap();
        assert_eq!(uri.tls, Some(Tls { name: "store".into(), certificates: None }));
    }

    /// Nothing is guessed of what is not understood.
    #[test]
    fn uris_that_are_not_wholly_understood_are_refused_with_a_reason() {
        for (text, word) in [
            ("nbd+vsock://2/x", "nbd+unix"),
            ("nbd://", "no host"),
            ("nbd:///x", "no host"),
            ("nbd://::1/x", "brackets"),
            ("nbd://h:port/x", "port"),
            ("nbd://user@h/x", "user name"),
            ("nbd://h/x?socket=/s", "nbd+unix"),
            ("nbd+unix:///x", "socket=/PATH"),
            ("nbd+unix:///x?socket=s", "absolute"),
            ("nbd+unix://h/x?socket=/s", "both"),
            ("nbd://h/x?tls-hostname=a", "nbds://"),
            ("nbds+unix:///x?socket=/s", "tls-hostname"),
            ("nbds://h/x?tls-verify-peer=0", "not trusted"),
            ("nbds://h/x?tls-psk-file=/f", "not known"),
            ("nbd://h/x?cache=none", "not known"),
            ("nbd://h/%zz", "hexadecimal"),
            ("nbd://h/%00", "zero byte"),
            ("nbd://h/x#y", "%23"),
        ] {
            assert!(NbdUri::is_meant(text), "{text}");
            let why = text.parse::<NbdUri>().unwrap_err();
            assert!(why.contains(word) && why.starts_with(text), "{why}");
        }
        for text in ["/nbd://x", "./nbd://x", "golden.raw", "nbd:x", "file:///x"] {
            assert!(!NbdUri::is_meant(text), "{text}");
        }
    }
}

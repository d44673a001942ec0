//! Whom a connection with TLS trusts, and how it proves itself: X.509 certificates in PEM files with the names that
//! QEMU and libnbd give them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::uri::Tls;

/// Where distributions keep whom they trust.
const SYSTEM: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

/// The client's side of a TLS session that goes on only with a server that has the right certificate.
pub(super) fn session(tls: &Tls) -> io::Result<ClientConnection> {
    let roots = match &tls.certificates {
        Some(dir) => roots(&dir.join("ca-cert.pem"))?,
        None => match SYSTEM.iter().find(|path| Path::new(path).exists()) {
            Some(path) => roots(Path::new(path))?,
            None => {
                return Err(wrong("the system trusts no certificates; name yours with tls-certificates=DIR"));
            }
        },
    };
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(wrong)?
        .with_root_certificates(roots);
    let config = match tls.certificates.as_deref().and_then(own_certificate) {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(&certificate)?;
            let key = PrivateKeyDer::from_pem_file(&key).map_err(|error| unreadable(&key, &error))?;
            config.with_client_auth_cert(chain, key).map_err(wrong)?
        }
    };
    let name = ServerName::try_from(tls.name.clone()).map_err(wrong)?;
    ClientConnection::new(Arc::new(config), name).map_err(wrong)
}

/// The files of a client's own certificate and key, if there are any: servers may ask for them.
fn own_certificate(dir: &Path) -> Option<(PathBuf, PathBuf)> {
    let (certificate, key) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
    (certificate.exists() || key.exists()).then_some((certificate, key))
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    read().map_err(|error| unreadable(path, &error))
}

fn roots(path: &Path) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    // Of the many that a system trusts, some may be too old to be understood.
    roots.add_parsable_certificates(certificates(path)?);
    if roots.is_empty() { Err(wrong(format!("{} has no certificate", path.display()))) } else { Ok(roots) }
}

fn unreadable(path: &Path, error: &pem::Error) -> io::Error {
    wrong(format!("cannot read {}: {error}", path.display()))
}

fn wrong(what: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("TLS: {}", what.to_string()))
}

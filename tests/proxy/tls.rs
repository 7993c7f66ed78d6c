//! Certificates for servers, clients and pgflip, and connections with TLS.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgflip::demo::cluster::Cluster;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SerialNumber};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::LIMIT;

pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Not every build of Postgres that tests get speaks TLS; the distribution's does.
pub const SPEAKS_TLS: u32 = 15;

/// An authority, and certificates that it has signed.
pub struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(directory.path().join("root.crt"), certificate.pem()).unwrap();
        // Servers run as another user when the tests run as root.
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Authority {
            directory,
            issuer: Issuer::new(params, key),
        }
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root.crt")
    }

    /// Certificate and key for a name, in files.
    pub fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from_slice(name.as_bytes()));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |extension| self.directory.path().join(format!("{name}.{extension}"));
        std::fs::write(path("crt"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        (path("crt"), path("key"))
    }

    /// A list of these, that has been the newest until then.
    pub fn revoke(&self, names: &[&str], until: i32) -> String {
        let (this_update, next_update) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(until, 1, 1));
        let revoked = names.iter().map(|name| rcgen::RevokedCertParams {
            serial_number: SerialNumber::from_slice(name.as_bytes()),
            revocation_time: this_update,
            reason_code: None,
            invalidity_date: None,
        });
        let list = rcgen::CertificateRevocationListParams {
            this_update,
            next_update,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

async fn reloaded(cluster: &Cluster, setting: &str, value: &str) {
    cluster.reload();
    let until = std::time::Instant::now() + LIMIT;
    loop {
        assert!(std::time::Instant::now() < until, "{setting}: {}", cluster.log_tail(5));
        let client = cluster.connect("postgres").await.unwrap();
        let now: String = client.query_one(&format!("show {setting}"), &[]).await.unwrap().get(0);
        if now == value {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// Gives a server a certificate.
pub async fn give(cluster: &mut Cluster, certificate: &Path, key: &Path) {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let owner = std::fs::metadata(cluster.log_path()).unwrap();
    let own = key.with_extension(format!("{}.key", cluster.port()));
    std::fs::copy(key, &own).unwrap();
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&own, Some(owner.uid()), Some(owner.gid())).unwrap();
    cluster.set("ssl_cert_file", certificate.to_str().unwrap()).unwrap();
    cluster.set("ssl_key_file", own.to_str().unwrap()).unwrap();
    cluster.set("ssl", "on").unwrap();
    reloaded(cluster, "ssl", "on").await;
}

/// What a client without its own idea of certificates trusts, and shows.
pub fn connector(root: &Path, shows: Option<&(PathBuf, PathBuf)>, alpn: bool) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(root).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shows {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                rustls::pki_types::PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
    };
    if alpn {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    TlsConnector::from(Arc::new(config))
}

/// Asks for TLS (`direct`: begins with it), and shakes hands.
pub async fn connect(connector: &TlsConnector, port: u16, direct: bool) -> std::io::Result<TlsStream<TcpStream>> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    socket.set_nodelay(true)?;
    if !direct {
        socket.write_all(&SSL_REQUEST).await?;
        assert_eq!(socket.read_u8().await?, b'S');
    }
    let name = ServerName::try_from("127.0.0.1").unwrap();
    connector.connect(name, socket).await
}

//! TLS on both legs.

use std::path::Path;

use pgflip::pg::Side;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::raw::{self, Raw};
use super::tls::{self, Authority, SPEAKS_TLS, SSL_REQUEST, connector};
use super::{PASSWORD, Servers};

const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

const WITH_TLS: [u32; 2] = [SPEAKS_TLS; 2];

/// Gives both servers a certificate.
async fn give_tls(servers: &mut Servers, certificate: &Path, key: &Path) {
    for cluster in [&mut servers.blue, &mut servers.green] {
        tls::give(cluster, certificate, key).await;
    }
}

/// Whether the server sees TLS on a client's connection through a proxy with this `sslmode`; or the error.
async fn leg(servers: &Servers, query: &str) -> Result<bool, String> {
    let front = servers.serve(query, "");
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    match raw.authenticate(PASSWORD).await {
        Ok(_) => {
            let before = raw
                .value("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
                .await;
            front.flip().await;
            let after = raw
                .value("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
                .await;
            assert_eq!(before, after, "{query}");
            Ok(before == "t")
        }
        Err(error) => Err(raw::describe(&[error])),
    }
}

/// Has both servers refuse connections of this kind, and of no other.
async fn reject(servers: &Servers, kind: &str) {
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        let row = admin.query_one("select current_setting('hba_file'), pg_conf_load_time()", &[]);
        let row = row.await.unwrap();
        let (file, before): (String, std::time::SystemTime) = (row.get(0), row.get(1));
        let rules = std::fs::read_to_string(&file).unwrap();
        let rest: Vec<&str> = rules.lines().filter(|rule| !rule.ends_with(" reject")).collect();
        let first = format!("{kind} all app,postgres 127.0.0.1/32 reject\n");
        std::fs::write(&file, first + &rest.join("\n") + "\n").unwrap();
        servers.cluster(side).reload();
        let until = std::time::Instant::now() + super::LIMIT;
        // New sessions say when the server has read its files, or are refused.
        while let Ok(session) = servers.cluster(side).connect("app").await {
            let row = session.query_one("select pg_conf_load_time()", &[]).await.unwrap();
            if row.get::<_, std::time::SystemTime>(0) > before {
                break;
            }
            assert!(std::time::Instant::now() < until, "the file is not read");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn every_sslmode_towards_servers_means_what_it_means_in_libpq() {
    let mut servers = Servers::with(WITH_TLS, &[], "").await;
    let authority = Authority::new();
    let root = authority.root().display().to_string();
    assert_eq!(leg(&servers, "sslmode=prefer").await, Ok(false), "without TLS");
    assert!(leg(&servers, "sslmode=require").await.is_err(), "there is no TLS");
    let (certificate, key) = authority.sign("127.0.0.1");
    give_tls(&mut servers, &certificate, &key).await;
    for (query, tls) in [
        ("sslmode=disable".to_owned(), false),
        ("sslmode=allow".to_owned(), false),
        ("sslmode=prefer".to_owned(), true),
        ("sslmode=require".to_owned(), true),
        (format!("sslmode=require&sslrootcert={root}"), true),
        (format!("sslmode=verify-ca&sslrootcert={root}"), true),
        (format!("sslmode=verify-full&sslrootcert={root}"), true),
    ] {
        assert_eq!(leg(&servers, &query).await, Ok(tls), "{query}");
    }
    // What is refused one way is tried the other way, if it may be.
    reject(&servers, "hostssl").await;
    assert!(leg(&servers, "sslmode=require").await.is_err());
    assert_eq!(leg(&servers, "sslmode=prefer").await, Ok(false));
    assert_eq!(leg(&servers, "sslmode=allow").await, Ok(false));
    reject(&servers, "hostnossl").await;
    assert!(leg(&servers, "sslmode=disable").await.is_err());
    assert_eq!(leg(&servers, "sslmode=allow").await, Ok(true));
    assert_eq!(leg(&servers, "sslmode=prefer").await, Ok(true));
    // Another authority, and another name.
    let stranger = Authority::new();
    let wrong = stranger.root().display().to_string();
    assert!(
        leg(&servers, &format!("sslmode=verify-ca&sslrootcert={wrong}"))
            .await
            .is_err()
    );
    assert!(
        leg(&servers, &format!("sslmode=require&sslrootcert={wrong}"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn only_verify_full_looks_at_the_name() {
    let mut servers = Servers::with(WITH_TLS, &[], "").await;
    let authority = Authority::new();
    let root = authority.root().display().to_string();
    let (certificate, key) = authority.sign("db.example");
    give_tls(&mut servers, &certificate, &key).await;
    assert_eq!(
        leg(&servers, &format!("sslmode=verify-ca&sslrootcert={root}")).await,
        Ok(true)
    );
    assert!(
        leg(&servers, &format!("sslmode=verify-full&sslrootcert={root}"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn requests_for_encryption_are_answered_once_each() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = Raw::connect(front.port()).await;
    for request in [GSSENC_REQUEST, SSL_REQUEST] {
        raw.send(&request).await;
        assert_eq!(raw.stream.read_u8().await.unwrap(), b'N');
    }
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    raw.authenticate(PASSWORD).await.expect("a login");
    assert_eq!(raw.value("select 1").await, "1");
    for request in [GSSENC_REQUEST, SSL_REQUEST] {
        let mut raw = Raw::connect(front.port()).await;
        raw.send(&request).await;
        assert_eq!(raw.stream.read_u8().await.unwrap(), b'N');
        raw.send(&request).await;
        assert_eq!(raw::code(&[raw.message().await]), "08P01");
        assert!(raw.next().await.is_none());
    }
}

#[tokio::test]
async fn clients_with_tls_are_served_and_bytes_before_it_are_refused() {
    let servers = Servers::start("").await;
    let authority = Authority::new();
    let (certificate, key) = authority.sign("127.0.0.1");
    let tls = |required: bool| {
        format!(
            "[tls]\ncert = \"{}\"\nkey = \"{}\"\nrequired = {required}",
            certificate.display(),
            key.display()
        )
    };
    let front = servers.serve("sslmode=disable", &tls(true));
    let connector = connector(&authority.root(), None, false);
    let stream = tls::connect(&connector, front.port(), false).await;
    let stream = stream.expect("a TLS handshake");
    let mut raw = Raw::on(Box::new(stream), front.port());
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    raw.authenticate(PASSWORD).await.expect("a login");
    assert_eq!(raw.value("select repeat('x', 300000)").await.len(), 300_000);
    front.flip().await;
    assert_eq!(raw.value("select repeat('y', 300000)").await.len(), 300_000);

    // libpq proves that it sees pgflip's certificate, and insists on that.
    let psql = async |ssl: &str, port: u16| {
        let tools = pgflip::demo::cluster::find_tools(15).expect("psql").bin;
        let url = format!("host=127.0.0.1 port={port} user=app dbname=app channel_binding=require {ssl}");
        let mut command = tokio::process::Command::new(tools.join("psql"));
        command
            .args(["-XAt", "-c", "select 'it is bound'", &url])
            .env("PGPASSWORD", PASSWORD);
        let output = command.output().await.expect("psql");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    assert_eq!(psql("sslmode=require", front.port()).await.trim(), "it is bound");

    // Without TLS: refused, because it is required.
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    assert_eq!(raw::code(&[raw.message().await]), "28000");

    // What comes with the request itself was put there by somebody in between.
    let mut raw = Raw::connect(front.port()).await;
    let mut early = SSL_REQUEST.to_vec();
    early.extend_from_slice(&[0, 0, 0, 8, 0, 3, 0, 0, 0]);
    raw.send(&early).await;
    let (kind, body) = raw.message().await;
    assert_eq!(kind, b'E');
    let text = pgflip::wire::message::ErrorFields(&body).describe();
    assert_eq!(text, "received unencrypted data after SSL request (08P01)");
    assert!(raw.next().await.is_none());

    // Not required: plain ones are served as well.
    let front = servers.serve("sslmode=disable", &tls(false));
    assert_eq!(front.raw().await.value("select 1").await, "1");
    let said = psql("sslmode=disable", front.port()).await;
    assert!(said.contains("channel binding"), "{said}");
}

/// Over TLS, asked for or begun with at once. `None`: the connection ended in the handshake, or right behind it.
async fn over_tls(connector: &TlsConnector, port: u16, direct: bool, user: &str) -> Option<Result<Raw, String>> {
    let stream = tls::connect(connector, port, direct).await.ok()?;
    let mut raw = Raw::on(Box::new(stream), port);
    let mut startup = Vec::new();
    let pairs = [("user", user), ("database", "app")].map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
    pgflip::wire::message::put_startup(&mut startup, &pairs);
    raw.stream.write_all(&startup).await.ok()?;
    raw.stream.flush().await.ok()?;
    // In TLS 1.3 a client hears only then that its certificate is refused.
    let (kind, body) = raw.next().await?;
    if kind == b'E' {
        return Some(Err(pgflip::wire::message::ErrorFields(&body).describe()));
    }
    assert_eq!((kind, &body[..]), (b'R', &[0, 0, 0, 0][..]), "nothing is asked");
    raw.until_ready().await;
    Some(Ok(raw))
}

#[tokio::test]
async fn client_certificates_name_their_user_and_tls_may_come_first() {
    let servers = Servers::start("").await;
    let (authority, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let (certificate, key) = authority.sign("127.0.0.1");
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ca = file("clients.crt", &std::fs::read_to_string(clients.root()).unwrap());
    let crl = file("clients.crl", &clients.revoke(&[], 2100));
    let quoted = PASSWORD.replace('"', "\"\"");
    let sections = |rules: &str| {
        format!(
            "[tls]\ncert = \"{}\"\nkey = \"{}\"\nclient_ca = \"{ca}\"\nclient_crl = \"{crl}\"\n\
             [auth]\nrules = \"{}\"\nident = \"{}\"\nverifiers = \"userlist\"\nuserlist = \"{}\"",
            certificate.display(),
            key.display(),
            file("pg_hba.conf", rules),
            file("pg_ident.conf", "people other app\n"),
            file("userlist.txt", &format!("\"app\" \"{quoted}\"\n")),
        )
    };
    let front = servers.serve("sslmode=disable", &sections("hostssl all all all cert\n"));
    let (app, other, forged) = (clients.sign("app"), clients.sign("other"), strangers.sign("app"));
    let root = authority.root();
    let [app, other, forged, none] =
        [Some(&app), Some(&other), Some(&forged), None].map(|shows| connector(&root, shows, true));
    let port = front.port();
    let failed = "certificate authentication failed for user \"app\" (28000)";
    let mut raw = over_tls(&app, port, false, "app")
        .await
        .unwrap()
        .expect("its own certificate");
    assert_eq!(
        over_tls(&other, port, false, "app").await.unwrap().map(|_| ()),
        Err(failed.to_owned())
    );
    let no = "connection requires a valid client certificate (28000)".to_owned();
    assert_eq!(
        over_tls(&none, port, false, "app").await.unwrap().map(|_| ()),
        Err(no.clone())
    );
    assert!(
        over_tls(&forged, port, false, "app").await.is_none(),
        "of another authority"
    );
    front.flip().await;
    assert_eq!(raw.value("select session_user").await, "app");

    // CVE-2021-3935: what was sent before TLS was up was taken for its owner's who has the certificate.
    let mut early = SSL_REQUEST.to_vec();
    pgflip::wire::message::put_startup(&mut early, &[(b"user".to_vec(), b"app".to_vec())]);
    early.extend_from_slice(&raw::query("drop table everything"));
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut socket, &early).await.unwrap();
    assert_eq!(
        socket.read_u8().await.unwrap(),
        b'E',
        "nobody is let on to TLS with that"
    );
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest).await;
    assert!(String::from_utf8_lossy(&rest).contains("received unencrypted data after SSL request"));

    // Beside a method: a certificate of the authority's, or one that names the user.
    front.reload(&servers, &sections("hostssl all all all trust clientcert=verify-ca\n"));
    assert!(over_tls(&other, port, false, "app").await.unwrap().is_ok());
    assert_eq!(over_tls(&none, port, false, "app").await.unwrap().map(|_| ()), Err(no));
    front.reload(
        &servers,
        &sections("hostssl all all all trust clientcert=verify-full\n"),
    );
    assert!(over_tls(&app, port, false, "app").await.unwrap().is_ok());
    assert_eq!(
        over_tls(&other, port, false, "app").await.unwrap().map(|_| ()),
        Err(failed.to_owned())
    );

    // A map names whom somebody may be.
    front.reload(&servers, &sections("hostssl all all all cert map=people\n"));
    assert!(over_tls(&other, port, false, "app").await.unwrap().is_ok());
    assert_eq!(
        over_tls(&app, port, false, "app").await.unwrap().map(|_| ()),
        Err(failed.to_owned())
    );
    front.reload(&servers, &sections("hostssl all all all trust clientcert=verify-ca\n"));

    // TLS first: only from who says that it speaks Postgres in there.
    let mut raw = over_tls(&app, port, true, "app").await.unwrap().expect("direct TLS");
    assert_eq!(raw.value("select session_user").await, "app");
    let unnamed = connector(&root, None, false);
    let told = over_tls(&unnamed, port, true, "app")
        .await
        .unwrap()
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        told,
        "received direct SSL connection request without ALPN protocol negotiation extension (08P01)"
    );
    // And not within TLS.
    let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let stream = app
        .connect(ServerName::try_from("127.0.0.1").unwrap(), socket)
        .await
        .unwrap();
    let mut twice = Raw::on(Box::new(stream), port);
    twice.send(&SSL_REQUEST).await;
    assert_eq!(raw::code(&[twice.message().await]), "08P01");

    // A certificate that is revoked, by a list that is read again; one that is out of date, or none at all.
    let reload = || front.proxy.as_ref().unwrap().reload_tls();
    file("clients.crl", &clients.revoke(&["other"], 2100));
    reload().unwrap();
    assert!(over_tls(&other, port, false, "app").await.is_none());
    assert!(over_tls(&app, port, false, "app").await.unwrap().is_ok());
    file("clients.crl", "");
    assert!(reload().unwrap_err().to_string().contains("holds no revocation list"));
    assert!(
        over_tls(&other, port, false, "app").await.is_none(),
        "nothing has changed"
    );
    file("clients.crl", &clients.revoke(&[], 2021));
    reload().unwrap();
    assert!(over_tls(&app, port, false, "app").await.is_none(), "who knows");

    // An authority that is exchanged counts for the next client.
    std::fs::copy(strangers.root(), &ca).unwrap();
    file("clients.crl", &strangers.revoke(&[], 2100));
    reload().unwrap();
    assert!(over_tls(&app, port, false, "app").await.is_none());
    assert!(over_tls(&forged, port, false, "app").await.unwrap().is_ok());
    assert_eq!(raw.value("select 'who is in stays in'").await, "who is in stays in");
}

#[tokio::test]
async fn large_values_pass_tls_both_ways_unchanged_however_slowly_they_are_read() {
    let mut servers = Servers::with(WITH_TLS, &[], "").await;
    let authority = Authority::new();
    let (certificate, key) = authority.sign("127.0.0.1");
    give_tls(&mut servers, &certificate, &key).await;
    let certificates = format!(
        "[tls]\ncert = \"{}\"\nkey = \"{}\"\nrequired = true\n",
        certificate.display(),
        key.display()
    );
    let connector = connector(&authority.root(), None, false);
    for mode in ["session", "transaction"] {
        let sections = format!("{certificates}[pool]\npool_mode = \"{mode}\"\n");
        let front = servers.serve("sslmode=require", &sections);
        let stream = tls::connect(&connector, front.port(), false).await;
        let mut raw = Raw::on(Box::new(stream.expect("a TLS handshake")), front.port());
        raw.startup(0, &[("user", "app"), ("database", "app")]).await;
        raw.authenticate(PASSWORD).await.expect("a login");
        let text: String = (0..600_000)
            .map(|n: u32| format!("{:08x}", n.wrapping_mul(2_654_435_761)))
            .collect();
        let query = raw::query(&format!("select '{text}'"));
        let (mut from_server, mut to_server) = tokio::io::split(&mut raw.stream);
        // The answer begins while the question still goes out; nobody takes it for a while.
        let write = async {
            // Twice: the second waits behind an answer that is not taken.
            to_server.write_all(&[&query[..], &query[..]].concat()).await.unwrap();
            to_server.flush().await.unwrap();
        };
        let read = async {
            let (mut answers, mut pause) = (Vec::new(), 40);
            while answers.iter().filter(|(kind, _)| *kind == b'Z').count() < 2 {
                tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
                pause = 0;
                answers.push(raw::read(&mut from_server).await.expect("an answer"));
            }
            answers
        };
        let ((), answers) = tokio::time::timeout(super::LIMIT, async { tokio::join!(write, read) })
            .await
            .expect("it comes to its end");
        let rows: Vec<_> = answers.iter().filter(|(kind, _)| *kind == b'D').collect();
        assert_eq!(rows.len(), 2, "{}", raw::kinds(&answers));
        for (_, row) in rows {
            assert!(row[6..] == *text.as_bytes(), "{mode}: another text");
        }
        front.flip().await;
        assert_eq!(raw.value("select repeat('y', 300000)").await.len(), 300_000);
    }
}

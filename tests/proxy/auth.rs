//! Rules, methods, and where verifiers come from.

use std::path::{Path, PathBuf};
use std::time::Instant;

use pgflip::demo::cluster;
use pgflip::pg::Side;
use pgflip::wire::message::ErrorFields;
use pgflip::wire::scram::{ClientExchange, Keys};

use super::raw::{self, Raw};
use super::{Front, LIMIT, PASSWORD, Servers, wait_until};

/// An md5 password's, and others'.
const OLD: &str = "from before";

/// Where a test's files are.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `[auth]` with these rules, and more keys.
    fn rules(&self, rules: &str, more: &str) -> String {
        let path = self.write("pg_hba.conf", rules);
        format!("[auth]\nrules = \"{}\"\n{more}\n", path.display())
    }

    /// The same with a Unix socket here.
    fn local(&self, rules: &str, more: &str) -> String {
        let directory = self.path().display();
        format!(
            "unix_socket_dir = \"{directory}\"\nunix_socket_mode = \"0777\"\n{}",
            self.rules(rules, more)
        )
    }

    /// A userlist in place of the catalog.
    fn userlist(&self, text: &str) -> String {
        let path = self.write("userlist.txt", text);
        format!("verifiers = \"userlist\"\nuserlist = \"{}\"", path.display())
    }
}

impl Servers {
    /// Runs this on both sides, as the superuser.
    async fn on_both(&self, sql: &str) {
        for side in Side::BOTH {
            self.admin(side).await.batch_execute(sql).await.unwrap();
        }
    }

    /// A role whose password has the same verifier on both sides, and that verifier.
    async fn role(&self, name: &str, password: &str, more: &str) -> String {
        let blue = self.admin(Side::Blue).await;
        blue.batch_execute(&format!("create role \"{name}\" login {more} password '{password}'"))
            .await
            .unwrap();
        let verifier: String = blue
            .query_one("select rolpassword from pg_authid where rolname = $1", &[&name])
            .await
            .unwrap()
            .get(0);
        let green = self.admin(Side::Green).await;
        green
            .batch_execute(&format!("create role \"{name}\" login {more} password '{verifier}'"))
            .await
            .unwrap();
        verifier
    }

    /// Both servers' own rules from now on, after one that lets the superuser in.
    async fn hba(&self, lines: &str) {
        for side in Side::BOTH {
            let admin = self.admin(side).await;
            let row = admin.query_one("select current_setting('hba_file'), pg_conf_load_time()", &[]);
            let row = row.await.unwrap();
            let (file, before): (String, std::time::SystemTime) = (row.get(0), row.get(1));
            let first = "host all postgres 127.0.0.1/32 scram-sha-256";
            std::fs::write(&file, format!("{first}\n{lines}\n")).unwrap();
            self.cluster(side).reload();
            let until = Instant::now() + LIMIT;
            // A new session says when the server has read its files.
            loop {
                let session = self.admin(side).await;
                let row = session.query_one("select pg_conf_load_time()", &[]).await.unwrap();
                if row.get::<_, std::time::SystemTime>(0) > before {
                    break;
                }
                assert!(Instant::now() < until, "the file is not read");
            }
        }
    }
}

/// Servers that let in whom they have an md5 password of, as they do no more by themselves.
const MD5: &str = "host all old 127.0.0.1/32 md5\nhost all all 127.0.0.1/32 scram-sha-256";

/// A login; what it was asked, and severity, SQLSTATE, message if it was refused.
async fn log_in(mut raw: Raw, user: &str, password: &str) -> (Vec<u8>, Result<Raw, String>) {
    raw.startup(0, &[("user", user), ("database", "app")]).await;
    match raw.authenticate(password).await {
        Ok(_) => (raw.asked.clone(), Ok(raw)),
        Err((_, body)) => {
            assert!(raw.next().await.is_none(), "closed");
            (raw.asked, Err(told(&body)))
        }
    }
}

fn told(body: &[u8]) -> String {
    let field = |kind| String::from_utf8_lossy(ErrorFields(body).field(kind).unwrap_or_default()).into_owned();
    format!("{} {} {}", field(b'S'), field(b'C'), field(b'M'))
}

async fn tcp(front: &Front, user: &str, password: &str) -> (Vec<u8>, Result<Raw, String>) {
    log_in(Raw::connect(front.port()).await, user, password).await
}

/// Is let in after it was asked this, and serves on both sides.
async fn is_in(login: (Vec<u8>, Result<Raw, String>), asked: &[u8], user: &str) -> Raw {
    let (was_asked, raw) = login;
    let mut raw = raw.unwrap_or_else(|told| panic!("{user}: {told}"));
    assert_eq!(was_asked, asked, "{user}");
    assert_eq!(raw.value("select session_user").await, user);
    raw
}

fn is_out(login: (Vec<u8>, Result<Raw, String>), asked: &[u8], message: &str) {
    let (was_asked, raw) = login;
    assert_eq!(raw.map(|_| ()).unwrap_err(), message);
    assert_eq!(was_asked, asked, "{message}");
}

fn wrong(user: &str) -> String {
    format!("FATAL 28P01 password authentication failed for user \"{user}\"")
}

/// psql of the newest tools: libpq's own idea of each method.
async fn psql(host: &str, port: u16, user: &str, password: &str, statement: &str) -> String {
    let tools = cluster::find_tools(15).expect("psql").bin;
    let output = tokio::process::Command::new(tools.join("psql"))
        .args([
            "-XAtw",
            "-h",
            host,
            "-p",
            &port.to_string(),
            "-U",
            user,
            "-d",
            "app",
            "-c",
            statement,
        ])
        .env("PGPASSWORD", password)
        .output()
        .await
        .expect("psql");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
        .trim()
        .to_owned()
}

#[tokio::test]
async fn the_first_rule_that_fits_says_how_and_what_was_shown_opens_both_servers() {
    let servers = Servers::start("").await;
    servers
        .on_both(&format!(
            "set password_encryption = 'md5'; create role old login password '{OLD}'"
        ))
        .await;
    servers.hba(MD5).await;
    let files = Files::new();
    let rules = "host app old 127.0.0.1/32 md5\n\
                 host app refused 127.0.0.0/8 reject\n\
                 host app trusted 127.0.0.1/32 trust\n\
                 host other all all trust\n\
                 host all app 127.0.0.1 255.255.255.255 md5\n";
    let front = servers.serve("sslmode=disable", &files.rules(rules, ""));
    // An md5 password opens both sides; libpq agrees on what it is.
    let mut old = is_in(tcp(&front, "old", OLD).await, &[5], "old").await;
    assert_eq!(
        psql("127.0.0.1", front.port(), "old", OLD, "select 'md5 is in'").await,
        "md5 is in"
    );
    is_out(tcp(&front, "old", "wrong").await, &[5], &wrong("old"));
    // A rule that says md5 takes SCRAM where the role has that, as Postgres does.
    let mut app = is_in(tcp(&front, "app", PASSWORD).await, &[10], "app").await;
    front.flip().await;
    for (raw, user) in [(&mut old, "old"), (&mut app, "app")] {
        assert_eq!(raw.value("select session_user").await, user);
        assert_eq!(raw.value("show port").await, servers.green.port().to_string());
    }
    // Trust opens no server that does not trust.
    let (asked, raw) = tcp(&front, "trusted", "x").await;
    let told = raw.map(|_| ()).unwrap_err();
    assert!(
        asked.is_empty() && told.contains("asks pgflip for a password"),
        "{told}"
    );

    // Who is refused by a rule, or fits none, is told what Postgres tells.
    servers
        .hba("host app refused all reject\nhost app trusted 127.0.0.1/32 trust")
        .await;
    for user in ["refused", "nobody"] {
        let (_, direct) = log_in(Raw::connect(servers.green.port()).await, user, "x").await;
        is_out(tcp(&front, user, "x").await, &[], &direct.map(|_| ()).unwrap_err());
    }
    // Where the server trusts as well, nothing is asked.
    servers.on_both("create role trusted login").await;
    is_in(tcp(&front, "trusted", "").await, &[], "trusted").await;

    // Without a rule that allows it, an md5 password is as good as none; and other rules count for the next client.
    front.reload(&servers, &files.rules("host all all all scram-sha-256", ""));
    is_out(tcp(&front, "old", OLD).await, &[10], &wrong("old"));
    servers.hba("host all all 127.0.0.1/32 md5").await;
    front.reload(&servers, &files.rules("host all all 127.0.0.1/32 password", ""));
    // In clear: whatever verifier the role has.
    is_in(tcp(&front, "old", OLD).await, &[3], "old").await;
    is_in(tcp(&front, "app", PASSWORD).await, &[3], "app").await;
    assert_eq!(
        psql("127.0.0.1", front.port(), "app", PASSWORD, "select 'so it is'").await,
        "so it is"
    );
    for (user, password) in [
        ("old", "wrong"),
        ("app", "wrong"),
        ("nobody", "x"),
        ("app", ""),
        ("trusted", "x"),
    ] {
        is_out(tcp(&front, user, password).await, &[3], &wrong(user));
    }
    assert_eq!(old.value("select 'goes on'").await, "goes on");
}

fn me() -> String {
    let output = std::process::Command::new("id").arg("-un").output().expect("id");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn a_unix_socket_serves_peers_and_nobody_else() {
    let servers = Servers::start("").await;
    let me = me();
    servers
        .on_both(&format!("create role \"{me}\" login; create role other login"))
        .await;
    servers
        .hba(&format!(
            "host all \"{me}\",other 127.0.0.1/32 trust\nhost all app 127.0.0.1/32 scram-sha-256"
        ))
        .await;
    let files = Files::new();
    let front = servers.serve(
        "sslmode=disable",
        &files.local("local all app scram-sha-256\nlocal all all peer\n", ""),
    );
    let local = async |user, password| log_in(Raw::local(files.path(), front.port()).await, user, password).await;
    let mut raw = is_in(local(&me, "").await, &[], &me).await;
    is_out(
        local("other", "").await,
        &[],
        "FATAL 28000 Peer authentication failed for user \"other\"",
    );
    let mut app = is_in(local("app", PASSWORD).await, &[10], "app").await;
    is_out(local("app", "wrong").await, &[10], &wrong("app"));
    let directory = files.path().to_str().unwrap();
    assert_eq!(
        psql(directory, front.port(), &me, "", "select 'libpq as well'").await,
        "libpq as well"
    );
    // Over TCP nobody fits: these lines are for the socket.
    let (_, refused) = tcp(&front, "app", PASSWORD).await;
    assert!(
        refused
            .map(|_| ())
            .unwrap_err()
            .contains("no pg_hba.conf entry for host \"127.0.0.1\"")
    );
    // TLS is not spoken there; who asks is told so and goes on without.
    let mut asks = Raw::local(files.path(), front.port()).await;
    asks.send(&[0, 0, 0, 8, 4, 210, 22, 47]).await;
    let mut answer = [0];
    tokio::io::AsyncReadExt::read_exact(&mut asks.stream, &mut answer)
        .await
        .unwrap();
    assert_eq!(&answer, b"N");
    is_in(log_in(asks, "app", PASSWORD).await, &[10], "app").await;

    // Sessions are shown, canceled and moved as any other.
    assert!(front.gate.sessions().iter().any(|session| session.client == "[local]"));
    app.send(&raw::query("select pg_sleep(60)")).await;
    servers.asleep().await;
    let mut cancel = Raw::local(files.path(), front.port()).await;
    cancel
        .send(&pgflip::wire::message::cancel_request(app.pid, &app.key))
        .await;
    assert!(cancel.next().await.is_none());
    assert_eq!(raw::code(&app.until_ready().await), "57014");
    front.flip().await;
    for raw in [&mut raw, &mut app] {
        assert_eq!(raw.value("show port").await, servers.green.port().to_string());
    }
    // A map says whom the operating system's users may be, and nobody else.
    let ident = files.write("pg_ident.conf", &format!("servers \"{me}\" other\n"));
    let ident = format!("ident = \"{}\"", ident.display());
    front.reload(&servers, &files.local("local all all peer map=servers", &ident));
    is_in(local("other", "").await, &[], "other").await;
    is_out(
        local(&me, "").await,
        &[],
        &format!("FATAL 28000 Peer authentication failed for user \"{me}\""),
    );
    let path = files.path().join(format!(".s.PGSQL.{}", front.port()));
    assert!(path.exists());
    drop(front);
    wait_until("the file goes with the process", || !path.exists()).await;
}

#[tokio::test]
async fn verifiers_come_from_a_query_a_userlist_or_a_login_and_who_has_expired_is_out_everywhere() {
    let servers = Servers::start("").await;
    servers.role("expired", "secret", "valid until '2020-01-01'").await;
    servers.role("victim", "its own", "").await;
    let listed = servers.role("listed", "in the file", "").await;
    servers
        .on_both(&format!(
            "set password_encryption = 'md5'; create role old login password '{OLD}';
             create role gone nologin password 'secret';"
        ))
        .await;
    servers.role("reader", "of pgflip", "").await;
    for side in Side::BOTH {
        let tools = cluster::find_tools(15).expect("psql").bin;
        let cluster = servers.cluster(side);
        let output = std::process::Command::new(tools.join("psql"))
            .args([
                "-XAtq",
                "-v",
                "role=reader",
                "-v",
                "ON_ERROR_STOP=1",
                "-f",
                "deploy/auth_query.sql",
            ])
            .arg(cluster.url_of("app"))
            .output()
            .expect("psql");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    servers.hba(MD5).await;
    let files = Files::new();
    let front = servers.serve("sslmode=disable", "");
    let rules = "host all all all scram-sha-256";

    // A query, as a role that can read nothing but what the function gives. (CVE-2025-2291: it said nothing of VALID UNTIL.)
    let reader = servers.admin(Side::Blue).await;
    reader.batch_execute("set role reader").await.unwrap();
    for refused in [
        "select * from pg_authid",
        "select * from pgflip_auth.verifier('postgres') offset 1",
    ] {
        let done = reader.query(refused, &[]).await;
        assert_eq!(done.is_err(), refused.contains("authid"), "{refused}");
    }
    let given = async |role: &str| {
        reader
            .query("select * from pgflip_auth.verifier($1)", &[&role])
            .await
            .unwrap()
            .len()
    };
    assert_eq!((given("app").await, given("old").await), (1, 1));
    for role in ["expired", "gone", "postgres", "nobody"] {
        assert_eq!(given(role).await, 0, "{role}");
    }
    reader.batch_execute("reset role; set role app").await.unwrap();
    let error = reader
        .query("select * from pgflip_auth.verifier('app')", &[])
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42501");
    let limited = servers.serve(
        "sslmode=disable&user=reader&password=of%20pgflip",
        &files.rules(rules, "verifiers = \"query\""),
    );
    is_in(tcp(&limited, "app", PASSWORD).await, &[10], "app").await;
    // In a hold, whom pgflip lets in waits, and no server says a word: it is pgflip that refuses.
    limited.gate.hold();
    for (user, password) in [
        ("expired", "secret"),
        ("gone", "secret"),
        ("nobody", "x"),
        ("app", "wrong"),
    ] {
        is_out(tcp(&limited, user, password).await, &[10], &wrong(user));
    }
    drop(limited);
    // PgBouncer's older query says nothing of expiry and NOLOGIN either, and leaves it open whose pg_authid it is.
    let of_authid = "verifiers = \"query\"\nquery = \"select rolname, rolpassword from pg_authid where rolname = $1\"";
    front.reload(&servers, &files.rules(rules, of_authid));
    is_in(tcp(&front, "victim", "its own").await, &[10], "victim").await;
    front.gate.hold();
    for (user, password) in [("expired", "secret"), ("gone", "secret")] {
        is_out(tcp(&front, user, password).await, &[10], &wrong(user));
    }
    // CVE-2025-12819: the search_path of whoever logs in decided where the query looked.
    let admin = servers.admin(Side::Blue).await;
    admin
        .batch_execute(
            "create schema theirs authorization app; set role app;
             create table theirs.pg_authid as select 'victim'::name as rolname, ''::text as rolpassword;
             create function theirs.now() returns timestamptz language sql as 'select ''2000-01-01''::timestamptz';
             grant usage on schema theirs to public; grant select on theirs.pg_authid to public;",
        )
        .await
        .unwrap();
    let theirs: String = {
        admin.batch_execute("reset role").await.unwrap();
        let row = admin
            .query_one("select rolpassword from pg_authid where rolname = 'listed'", &[])
            .await
            .unwrap();
        row.get(0)
    };
    admin
        .execute("update theirs.pg_authid set rolpassword = $1", &[&theirs])
        .await
        .unwrap();
    admin
        .batch_execute("alter database app set search_path = theirs, pg_catalog")
        .await
        .unwrap();
    front.unwind();
    // Whose own connection begins with that path, if it is not kept from it.
    let attacked = servers.serve("sslmode=disable", &files.rules(rules, of_authid));
    attacked.gate.hold();
    for more in [
        ("search_path", "theirs, pg_catalog"),
        ("options", "-c search_path=theirs,pg_catalog"),
        ("application_name", "x', search_path = 'theirs"),
    ] {
        for reload in [of_authid, "verifiers = \"query\"", "verifiers = \"catalog\""] {
            attacked.reload(&servers, &files.rules(rules, reload));
            let mut raw = Raw::connect(attacked.port()).await;
            raw.startup(0, &[("user", "victim"), ("database", "app"), more]).await;
            let (_, body) = raw.authenticate("in the file").await.expect_err("another's password");
            assert_eq!(told(&body), wrong("victim"), "{more:?} {reload}");
        }
    }
    admin
        .batch_execute("alter database app reset search_path")
        .await
        .unwrap();
    drop(attacked);

    // A userlist: a verifier, an md5 hash, passwords. Of these the first is right, the second is not the server's.
    let hash: String = admin
        .query_one("select rolpassword from pg_authid where rolname = 'old'", &[])
        .await
        .unwrap()
        .get(0);
    let quoted = PASSWORD.replace('"', "\"\"");
    let list = format!(
        "; as PgBouncer has it\n\"listed\" \"{listed}\"\n\"old\" \"{hash}\"\n\"app\" \"{quoted}\"\n\"victim\" \"not its own\"\n\
         \"expired\" \"secret\"\n\"gone\" \"secret\"\n"
    );
    let rules = "host all listed,app all scram-sha-256\nhost all old all md5\nhost all all all password";
    front.reload(&servers, &files.rules(rules, &files.userlist(&list)));
    let mut raws = Vec::new();
    for (user, password, asked) in [("listed", "in the file", 10), ("old", OLD, 5), ("app", PASSWORD, 10)] {
        raws.push((user, is_in(tcp(&front, user, password).await, &[asked], user).await));
    }
    front.gate.hold();
    for (user, password, asked) in [
        ("listed", "wrong", 10),
        ("app", "wrong", 10),
        ("victim", "not its own", 3),
        ("victim", "its own", 3),
        ("expired", "secret", 3),
        ("gone", "secret", 3),
        ("reader", "of pgflip", 3),
        ("nobody", "x", 3),
    ] {
        is_out(tcp(&front, user, password).await, &[asked], &wrong(user));
    }
    front.unwind();
    // What is kept of a password moves its session, and lets in who shows none where a rule allows that.
    front.flip().await;
    for (user, raw) in &mut raws {
        assert_eq!(raw.value("select session_user").await, *user);
    }
    front.reload(
        &servers,
        &files.rules("host all app,old all trust", &files.userlist(&list)),
    );
    is_in(tcp(&front, "app", "").await, &[], "app").await;
    is_in(tcp(&front, "old", "").await, &[], "old").await;
    // A password that has changed on the active side and in the file counts when the file is read again.
    let green = servers.admin(Side::Green).await;
    green.batch_execute("alter role app password 'new'").await.unwrap();
    let list = list.replace(&quoted, "new");
    front.reload(
        &servers,
        &files.rules("host all all all scram-sha-256", &files.userlist(&list)),
    );
    is_in(tcp(&front, "app", "new").await, &[10], "app").await;
    is_out(tcp(&front, "app", PASSWORD).await, &[10], &wrong("app"));
}

#[tokio::test]
async fn where_nobody_may_read_verifiers_the_server_checks_a_password_once_and_its_keys_go_on() {
    let servers = Servers::start("").await;
    // Nobody may carry verifiers over either: each side has salted the same password by itself.
    servers.on_both("create role one login password 'of one'").await;
    for (name, more) in [("two", ""), ("expired", "valid until '2020-01-01'")] {
        servers.role(name, &format!("of {name}"), more).await;
    }
    servers
        .on_both(&format!(
            "set password_encryption = 'md5'; create role old login password '{OLD}'; create role gone nologin password 'x'"
        ))
        .await;
    servers.hba(MD5).await;
    let files = Files::new();
    let rules = "local all all md5\nhost all all all password";
    let front = servers.serve("sslmode=disable", &files.local(rules, "verifiers = \"login\""));
    let local = async |user, password| log_in(Raw::local(files.path(), front.port()).await, user, password).await;
    // Nobody knows anything of it yet.
    is_out(local("one", "of one").await, &[10], &wrong("one"));
    let mut one = is_in(tcp(&front, "one", "of one").await, &[3], "one").await;
    let mut old = is_in(tcp(&front, "old", OLD).await, &[3], "old").await;
    front.gate.hold();
    for (user, password) in [
        ("one", "wrong"),
        ("old", "wrong"),
        ("nobody", "x"),
        ("expired", "of expired"),
    ] {
        is_out(tcp(&front, user, password).await, &[3], &wrong(user));
    }
    front.unwind();
    // The server's own words where it is not about the password.
    let (_, direct) = log_in(Raw::connect(servers.blue.port()).await, "gone", "x").await;
    is_out(tcp(&front, "gone", "x").await, &[3], &direct.map(|_| ()).unwrap_err());
    // From then on it is known what the password gives: no password is needed for a login, nor for a flip.
    let mut again = is_in(local("one", "of one").await, &[10], "one").await;
    is_in(local("old", OLD).await, &[5], "old").await;
    is_out(local("one", "wrong").await, &[10], &wrong("one"));
    is_out(local("two", "of two").await, &[10], &wrong("two"));
    front.flip().await;
    for (raw, user) in [(&mut one, "one"), (&mut again, "one"), (&mut old, "old")] {
        assert_eq!(raw.value("select session_user").await, user);
        assert_eq!(raw.value("show port").await, servers.green.port().to_string());
    }
    // One stops in the middle of its proof of the password that is still right.
    let mut late = Raw::local(files.path(), front.port()).await;
    late.startup(0, &[("user", "one"), ("database", "app")]).await;
    late.message().await;
    let (mut exchange, first) = ClientExchange::begin(None, None);
    let data = [
        b"SCRAM-SHA-256\0",
        &(first.len() as u32).to_be_bytes()[..],
        first.as_bytes(),
    ]
    .concat();
    late.send(&raw::plain(b'p', &data)).await;
    let (_, server_first) = late.message().await;
    let (salt, iterations) = ClientExchange::salt(&server_first[4..]).unwrap();
    exchange.with(Keys::derive(b"of one", &salt, iterations).unwrap());
    let last = exchange.respond(&server_first[4..]).unwrap();

    // What was known once does not outlive the role's right to log in, nor does it keep a new password out.
    let green = servers.admin(Side::Green).await;
    green
        .batch_execute("alter role one valid until '2020-01-01'")
        .await
        .unwrap();
    front.gate.hold();
    is_out(local("one", "of one").await, &[10], &wrong("one"));
    is_out(tcp(&front, "one", "of one").await, &[3], &wrong("one"));
    front.unwind();
    green
        .batch_execute("alter role one valid until 'infinity' password 'another'")
        .await
        .unwrap();
    is_in(tcp(&front, "one", "another").await, &[3], "one").await;
    is_in(local("one", "another").await, &[10], "one").await;
    // It has shown the password of before, and does not get what the one of now has taught.
    late.send(&raw::plain(b'p', last.as_bytes())).await;
    let said = late.until_closed().await;
    assert_eq!(raw::code(&said), "28P01", "{}", raw::describe(&said));
    // A server that lets in whoever comes has checked nothing.
    servers.hba("host all two 127.0.0.1/32 trust").await;
    for password in ["of two", "wrong"] {
        is_out(
            tcp(&front, "two", password).await,
            &[3],
            "FATAL 28000 the server (green) asks pgflip for no password, so that none can be checked there",
        );
    }
}

/// A PROXY protocol header for a client at this address.
fn header(client: &str) -> Vec<u8> {
    let client: std::net::SocketAddrV4 = client.parse().unwrap();
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    bytes.extend_from_slice(&client.ip().octets());
    bytes.extend_from_slice(&[127, 0, 0, 1]);
    bytes.extend_from_slice(&client.port().to_be_bytes());
    bytes.extend_from_slice(&5432u16.to_be_bytes());
    bytes
}

#[tokio::test]
async fn an_address_that_guesses_is_kept_waiting_and_no_other_is() {
    let servers = Servers::start("").await;
    let files = Files::new();
    let rules = "host all all 192.0.2.66/32 reject\n\
                 host all all 192.0.2.77/32 password\n\
                 host all all 192.0.2.0/24 scram-sha-256\n";
    let limits = "failures_max = 3\nfailures_window = \"1h\"";
    let above = "proxy_protocol = [\"127.0.0.1/32\"]\n";
    let front = servers.serve("sslmode=disable", &format!("{above}{}", files.rules(rules, limits)));
    let from = async |address: &str, user, password| {
        let mut raw = Raw::connect(front.port()).await;
        raw.send(&header(address)).await;
        log_in(raw, user, password).await
    };
    let mut raw = is_in(from("192.0.2.1:1000", "app", PASSWORD).await, &[10], "app").await;
    assert_eq!(front.gate.sessions()[0].client, "192.0.2.1:1000");
    assert_eq!(raw.value("select repeat('x', 100000)").await.len(), 100_000);
    // Rules see the client, and so do those that they refuse.
    is_out(
        from("192.0.2.66:1000", "app", PASSWORD).await,
        &[],
        "FATAL 28000 pg_hba.conf rejects connection for host \"192.0.2.66\", user \"app\", database \"app\", no encryption",
    );
    let (_, outside) = from("198.51.100.1:1000", "app", PASSWORD).await;
    assert!(
        outside
            .map(|_| ())
            .unwrap_err()
            .contains("no pg_hba.conf entry for host \"198.51.100.1\"")
    );
    // That the load balancer is on this machine does not keep others from reading what comes to it.
    is_out(
        from("192.0.2.77:1000", "app", PASSWORD).await,
        &[],
        "FATAL 28000 pgflip takes passwords in clear over TLS only",
    );

    // Guessing: many at once get no more than one after the other, and then not even the right one.
    let limited = "FATAL 28000 too many failed logins from this address";
    let mut guesses = Vec::new();
    for n in 0..12 {
        let mut raw = Raw::connect(front.port()).await;
        raw.send(&header(&format!("192.0.2.1:{}", 2000 + n))).await;
        raw.startup(
            0,
            &[("user", if n % 2 == 0 { "app" } else { "nobody" }), ("database", "app")],
        )
        .await;
        guesses.push(raw);
    }
    let mut told_to = Vec::new();
    for mut raw in guesses {
        let (_, body) = raw.authenticate("wrong").await.expect_err("a wrong password");
        told_to.push(told(&body));
    }
    let looked_at = told_to.iter().filter(|told| told.contains("28P01")).count();
    assert_eq!(looked_at, 3, "{told_to:?}");
    assert!(told_to.iter().skip(3).all(|told| told == limited), "{told_to:?}");
    is_out(from("192.0.2.1:3000", "app", PASSWORD).await, &[], limited);
    is_in(from("192.0.2.2:1000", "app", PASSWORD).await, &[10], "app").await;
    assert_eq!(raw.value("select 'who is in stays in'").await, "who is in stays in");
    front.reload(&servers, &format!("{above}{}", files.rules(rules, "failures_max = 0")));
    is_in(from("192.0.2.1:3001", "app", PASSWORD).await, &[10], "app").await;

    // A load balancer has to say whom it speaks for, and from elsewhere nobody may.
    let mut silent = Raw::connect(front.port()).await;
    silent
        .startup(
            0,
            &[("user", "app"), ("database", "app"), ("options", "-c work_mem=1MB")],
        )
        .await;
    assert_eq!(raw::code(&[silent.message().await]), "08P01");
    let plain = servers.serve("sslmode=disable", "");
    let mut liar = Raw::connect(plain.port()).await;
    liar.send(&header("192.0.2.1:1")).await;
    assert_eq!(raw::code(&[liar.message().await]), "08P01");
    // One that speaks for itself is itself; and this machine is not limited.
    let mut check = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec();
    check[12] = 0x20;
    let mut health = Raw::connect(front.port()).await;
    health.send(&check).await;
    let (_, itself) = log_in(health, "app", PASSWORD).await;
    assert!(itself.map(|_| ()).unwrap_err().contains("host \"127.0.0.1\""));
    for _ in 0..12 {
        is_out(tcp(&plain, "app", "wrong").await, &[10], &wrong("app"));
    }
    is_in(tcp(&plain, "app", PASSWORD).await, &[10], "app").await;
}

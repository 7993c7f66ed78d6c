use super::*;

const GOOD: &str = r#"
databases = ["app"]
[blue]
url = "postgresql://pgflip:hunter2-blue@127.0.0.1:5432"
[green]
url = "postgresql://pgflip:hunter2-green@127.0.0.1:5433"
"#;

fn env(name: &str) -> Option<String> {
    match name {
        "TOKEN" => Some("0123456789abcdef0123".into()),
        "URL" => Some("postgresql://me:hunter2-env@db.example:6000?sslmode=require".into()),
        "BAD" => Some("hunter2-bad".into()),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    parse_with(text, Path::new("conf/pgflip.toml"), &env)
}

fn problems(text: &str) -> Vec<Problem> {
    match parse(text) {
        Err(ConfigError::Invalid { problems, .. }) => problems,
        other => panic!("{text}\n→ {other:?}"),
    }
}

/// A good configuration with `line` added to `section`; the line has number 1 of the text.
fn with(section: &str, line: &str) -> String {
    match section {
        "" => format!("{line}{GOOD}"),
        "blue" | "green" => GOOD.replacen(&format!("[{section}]\n"), &format!("[{section}]\n{line}\n"), 1),
        _ => format!("{GOOD}[{section}]\n{line}\n"),
    }
}

#[test]
fn the_smallest_configuration_gets_the_defaults() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:6432");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:6433");
    assert_eq!(config.admin.token, None);
    assert_eq!(config.databases, ["app"]);
    assert_eq!(config.auth.rules, Rules::everybody(Method::Scram));
    assert_eq!(config.auth.verifiers, Verifiers::Catalog);
    assert_eq!(config.flip.stragglers, Stragglers::Unwind);
    assert_eq!(config.flip.drain_timeout, Duration::from_secs(5));
    assert_eq!(config.log_level, "info");
    assert_eq!(config.blue.sslmode, SslMode::Prefer);
    assert_eq!(config.blue.password.unwrap().expose(), "hunter2-blue");
    assert_eq!(
        (config.green.link_host.as_str(), config.green.link_port),
        ("127.0.0.1", 5433)
    );
    assert!(config.workers >= 1);
}

#[test]
fn the_example_that_is_shipped_is_valid_and_says_what_the_defaults_say() {
    let shipped = parse_with(include_str!("../../config.toml"), Path::new("config.toml"), &|_| None).unwrap();
    let mut bare = parse(GOOD).unwrap();
    assert_eq!((shipped.blue.host.as_str(), shipped.blue.port), ("127.0.0.1", 5432));
    assert_eq!((shipped.green.host.as_str(), shipped.green.port), ("127.0.0.1", 5433));
    bare.blue = shipped.blue.clone();
    bare.green = shipped.green.clone();
    assert_eq!(shipped, bare);
    // Every commented-out key is one that exists, with a value that is valid.
    let all: String = include_str!("../../config.toml")
        .lines()
        .map(|line| match line.strip_prefix("#: ") {
            Some(key) => format!("{key}\n"),
            None => format!("{line}\n"),
        })
        .collect();
    let all = all.replace("/etc/pgflip/", "/dev/null/");
    let wrong: Vec<Problem> = match parse_with(&all, Path::new("config.toml"), &env) {
        Ok(_) => Vec::new(),
        Err(ConfigError::Invalid { problems, .. }) => problems,
        Err(other) => panic!("{other}"),
    };
    for problem in wrong {
        assert!(
            problem.what.contains("can't be read")
                || problem.what.contains("no pg_dump")
                || problem.what.contains("no directory")
                || problem.what.contains("not used")
                || problem.what.contains("say that already")
                || problem.what.contains("not set"),
            "{problem:?}"
        );
    }
}

/// Section, line, key, value shown, part of what, part of fix.
type Mistake = (
    &'static str,
    &'static str,
    &'static str,
    Option<&'static str>,
    &'static str,
    &'static str,
);

#[test]
fn each_kind_of_mistake_names_its_key_value_line_and_remedy() {
    let kinds: &[Mistake] = &[
        (
            "pool",
            "pool_mode = \"query\"",
            "pool.pool_mode",
            Some("\"query\""),
            "",
            "\"statement\"",
        ),
        (
            "pool",
            "session_databases = [\"other\"]",
            "pool.session_databases",
            Some("\"other\""),
            "not among `databases`",
            "Name databases",
        ),
        (
            "pool",
            "transaction_users = [\"a\"]\nsession_users = [\"a\"]",
            "pool.transaction_users",
            Some("\"a\""),
            "with two modes",
            "once",
        ),
        (
            "pool",
            "reserve_pool_size = 2\nreserve_pool_timeout = \"2m\"",
            "pool.reserve_pool_size",
            Some("2"),
            "never used",
            "below query_wait_timeout",
        ),
        (
            "pool",
            "max_db_connections = -1",
            "pool.max_db_connections",
            Some("-1"),
            "out of range",
            "from 0",
        ),
        (
            "limits",
            "client_idle_timeout = \"500ms\"",
            "limits.client_idle_timeout",
            Some("\"500ms\""),
            "too short",
            "\"0s\" for no limit",
        ),
        (
            "limits",
            "idle_transaction_timeout = 30",
            "limits.idle_transaction_timeout",
            Some("30"),
            "no unit",
            "\"30s\"",
        ),
        ("pool", "pool_size = 0", "pool.pool_size", Some("0"), "", ""),
        (
            "pool",
            "min_pool_size = 21",
            "pool.min_pool_size",
            Some("21"),
            "more than pool_size",
            "below",
        ),
        (
            "blue",
            "listen = \"127.0.0.1:1\"",
            "blue.listen",
            None,
            "unknown key",
            "above all sections",
        ),
        ("", "token = \"x\"", "token", None, "unknown key", "[admin]"),
        ("", "[purple]\nx = 1", "purple", None, "unknown key", "Known here"),
        (
            "flip",
            "drain_timeot = \"5s\"",
            "flip.drain_timeot",
            None,
            "unknown key",
            "\"drain_timeout\"",
        ),
        (
            "flip",
            "drain_timeout = 5",
            "flip.drain_timeout",
            Some("5"),
            "no unit",
            "\"5s\"",
        ),
        (
            "flip",
            "drain_timeout = \"5 parsecs\"",
            "flip.drain_timeout",
            Some("\"5 parsecs\""),
            "no duration",
            "\"200ms\"",
        ),
        (
            "flip",
            "drain_timeout = \"99999999999999999999s\"",
            "flip.drain_timeout",
            Some("\"99999999999999999999s\""),
            "no duration",
            "\"5s\"",
        ),
        (
            "flip",
            "drain_timeout = \"9h\"",
            "flip.drain_timeout",
            Some("\"9h\""),
            "out of range",
            "3600s",
        ),
        (
            "flip",
            "stragglers = \"kill\"",
            "flip.stragglers",
            Some("\"kill\""),
            "choices",
            "\"unwind\" or \"terminate\"",
        ),
        (
            "flip",
            "sequence_cushion = -1",
            "flip.sequence_cushion",
            Some("-1"),
            "out of range",
            "from 0",
        ),
        (
            "",
            "listen = \"localhost:6432\"",
            "listen",
            Some("\"localhost:6432\""),
            "not an IP address",
            "127.0.0.1:6432",
        ),
        (
            "",
            "listen = \"*:6432\"",
            "listen",
            Some("\"*:6432\""),
            "not an IP address",
            "0.0.0.0:6432",
        ),
        (
            "",
            "listen = 6432",
            "listen",
            Some("6432"),
            "must be a string",
            "quotes",
        ),
        (
            "",
            "workers = \"two\"",
            "workers",
            Some("\"two\""),
            "not an integer",
            "without quotes",
        ),
        ("", "workers = 0", "workers", Some("0"), "out of range", "from 1"),
        (
            "",
            "custom_settings = [\"tenant\"]",
            "custom_settings",
            Some("\"tenant\""),
            "custom setting",
            "app.tenant",
        ),
        (
            "",
            "pg_bin = \"/nowhere\"",
            "pg_bin",
            Some("\"/nowhere\""),
            "no pg_dump",
            "leave the key out",
        ),
        ("", "flip = 3", "flip", None, "must be a section", "[flip]"),
        (
            "tls",
            "required = \"yes\"",
            "tls.required",
            Some("\"yes\""),
            "neither true nor false",
            "without quotes",
        ),
        (
            "tls",
            "cert = \"/nowhere.pem\"",
            "tls.cert",
            Some("\"/nowhere.pem\""),
            "can't be read",
            "PEM",
        ),
        (
            "log",
            "format = \"xml\"",
            "log.format",
            Some("\"xml\""),
            "choices",
            "\"json\"",
        ),
        (
            "log",
            "level = \"pgflip=loud\"",
            "log.level",
            Some("\"pgflip=loud\""),
            "log filter",
            "\"info\"",
        ),
        (
            "auth",
            "method = \"md5\"",
            "auth.method",
            Some("\"md5\""),
            "choices",
            "\"scram\"",
        ),
        (
            "limits",
            "max_clients = 0",
            "limits.max_clients",
            Some("0"),
            "out of range",
            "from 1",
        ),
        (
            "admin",
            "listen = \"0.0.0.0:6433\"",
            "admin.listen",
            Some("\"0.0.0.0:6433\""),
            "without a token",
            "admin.token",
        ),
        (
            "admin",
            "listen = \"127.0.0.1:6432\"",
            "admin.listen",
            Some("\"127.0.0.1:6432\""),
            "share one address",
            "different",
        ),
        (
            "admin",
            "token = \"short\"",
            "admin.token",
            None,
            "shorter than 16",
            "openssl",
        ),
        (
            "admin",
            "token = \"with blanks in it, long\"",
            "admin.token",
            None,
            "visible ASCII",
            "openssl",
        ),
        (
            "admin",
            "token = { env = \"MISSING\" }",
            "admin.token (environment variable MISSING)",
            None,
            "not set",
            "Set it",
        ),
        (
            "admin",
            "token = { file = \"nowhere\" }",
            "admin.token (file conf/nowhere)",
            None,
            "can't be read",
            "readable",
        ),
        (
            "admin",
            "token = { vault = \"x\" }",
            "admin.token",
            None,
            "where the value comes from",
            "env",
        ),
        (
            "flip",
            "drain_timeout = { env = \"BAD\" }",
            "flip.drain_timeout (environment variable BAD)",
            None,
            "no duration",
            "5s",
        ),
        (
            "blue",
            "password = \"hunter2-two\"",
            "blue.password",
            None,
            "password too",
            "Keep one",
        ),
        (
            "blue",
            "link_port = 70000",
            "blue.link_port",
            Some("70000"),
            "out of range",
            "65535",
        ),
    ];
    for (section, line, key, value, what, fix) in kinds {
        let text = with(section, line);
        let found = problems(&text);
        let problem = found
            .iter()
            .find(|p| p.key == *key)
            .unwrap_or_else(|| panic!("{line}: {found:?}"));
        assert_eq!(problem.value.as_deref(), *value, "{line}");
        assert!(problem.what.contains(what), "{line}: {problem:?}");
        assert!(problem.fix.contains(fix), "{line}: {problem:?}");
        let first = line.lines().next().unwrap();
        let expected = text.lines().position(|l| l == first).unwrap() + 1;
        assert_eq!(problem.line, expected, "{line}: {problem:?}");
    }
}

#[test]
fn urls_are_read_as_libpq_reads_them() {
    let server = |url: &str| {
        parse(&GOOD.replace("postgresql://pgflip:hunter2-blue@127.0.0.1:5432", url))
            .unwrap()
            .blue
    };
    let plain = server("postgres://me@db.example");
    assert_eq!(
        (plain.host.as_str(), plain.port, plain.user.as_str(), plain.password),
        ("db.example", 5432, "me", None)
    );
    let encoded = server("postgresql://m%40e:p%3A%2F%40%25w@[::1]:6000/app?sslmode=require");
    assert_eq!(
        (encoded.user.as_str(), encoded.password.unwrap().expose()),
        ("m@e", "p:/@%w")
    );
    assert_eq!(
        (encoded.host.as_str(), encoded.port, encoded.sslmode),
        ("::1", 6000, SslMode::Require)
    );
    let socket = server("postgresql://me@%2Fvar%2Frun/");
    assert_eq!((socket.host.as_str(), socket.port), ("/var/run", 5432));
    let query = server("postgresql:///app?host=/tmp&port=5434&user=me&password=secret");
    assert_eq!(
        (query.host.as_str(), query.port, query.user.as_str()),
        ("/tmp", 5434, "me")
    );
    for (mode, expected) in [
        ("disable", SslMode::Disable),
        ("allow", SslMode::Allow),
        ("prefer", SslMode::Prefer),
    ] {
        assert_eq!(server(&format!("postgresql://me@h?sslmode={mode}")).sslmode, expected);
    }
}

#[test]
fn a_url_that_is_wrong_is_explained_without_showing_it() {
    for (url, what) in [
        ("mysql://me:hunter2@h", "no Postgres URL"),
        ("host=h user=me password=hunter2", "no Postgres URL"),
        ("postgresql://:hunter2@h", "no user"),
        ("postgresql://me:hunter2@", "no host"),
        ("postgresql://me:hunter2@h:port", "port is not a number"),
        ("postgresql://me:hunter2@h:0", "port is not a number"),
        ("postgresql://me:hunter2@h:99999", "port is not a number"),
        ("postgresql://me:hunter2/x@h", "port is not a number"),
        ("postgresql://me:hunter2@x@h", "must be written as %40"),
        ("postgresql://me:hunter2#x@h", "must be written as %23"),
        ("postgresql://me:hunter2%zz@h", "hexadecimal"),
        ("postgresql://me:hunter2%0@h", "hexadecimal"),
        ("postgresql://me:hunter2%ff@h", "not UTF-8"),
        ("postgresql://me:hunter2%00@h", "hexadecimal"),
        ("postgresql://me:hunter2@a,b", "several hosts"),
        ("postgresql://me:hunter2@[::1", "not closed"),
        ("postgresql://me:hunter2@h?sslmode=hunter2", "sslmode is not one"),
        (
            "postgresql://me:hunter2@h?sslmode=verify-full",
            "nothing to check it against",
        ),
        ("postgresql://me:hunter2@h?sslrootcert=system", "not supported"),
        ("postgresql://me:hunter2@h?connect_timeout=3", "connect_timeout"),
        ("postgresql://me:hunter2@h?sslmode", "has no value"),
        ("postgresql://me:hunter2@h/other", "\"other\""),
        ("postgresql://me:hunter2@127.0.0.1:5433", "the same server"),
    ] {
        let text = GOOD.replace("postgresql://pgflip:hunter2-blue@127.0.0.1:5432", url);
        let error = parse(&text).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(what), "{url}: {shown}");
        assert!(!shown.contains("hunter2"), "{url}: {shown}");
    }
}

#[test]
fn all_problems_are_reported_at_once_in_the_order_of_their_lines() {
    let found = problems("listen = 1\nworkers = 0\nnonsense = 2\n[flip]\nstragglers = 7\n");
    let keys: Vec<(usize, &str)> = found.iter().map(|p| (p.line, p.key.as_str())).collect();
    for expected in [
        (1, "listen"),
        (2, "workers"),
        (3, "nonsense"),
        (5, "flip.stragglers"),
        (1, "databases"),
        (1, "blue.url"),
        (1, "green.url"),
    ] {
        assert!(keys.contains(&expected), "{expected:?} is not in {keys:?}");
    }
    assert!(keys.is_sorted_by_key(|(line, _)| *line));
}

#[test]
fn text_that_is_not_toml_is_reported_with_its_line_and_without_its_content() {
    let error = parse("listen = \"127.0.0.1:6432\"\n[blue]\nurl = \"postgresql://me:hunter2@h\" oops\n").unwrap_err();
    let shown = error.to_string();
    assert!(shown.contains("conf/pgflip.toml:3: not valid TOML"), "{shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn values_come_from_the_environment_and_from_files() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("password"), "from a file\n").unwrap();
    let text = "databases = [\"app\"]\nworkers = { env = \"N\" }\n[blue]\nurl = { env = \"URL\" }\n[green]\nurl = \"postgresql://me@h\"\npassword = { file = \"password\" }\n[admin]\ntoken = { env = \"TOKEN\" }\nlisten = \"0.0.0.0:1\"\n";
    let env = |name: &str| if name == "N" { Some("3".into()) } else { env(name) };
    let config = parse_with(text, &directory.path().join("pgflip.toml"), &env).unwrap();
    assert_eq!(config.workers, 3);
    assert_eq!(
        (config.blue.host.as_str(), config.blue.port, config.blue.sslmode),
        ("db.example", 6000, SslMode::Require)
    );
    assert_eq!(config.green.password.unwrap().expose(), "from a file");
    assert_eq!(config.admin.token.unwrap().expose(), "0123456789abcdef0123");
}

#[test]
fn no_secret_is_in_the_debug_form_of_a_configuration() {
    let text = GOOD.to_owned() + "[admin]\ntoken = \"hunter2-hunter2-hunter2\"\n";
    assert!(!format!("{:?}", parse(&text).unwrap()).contains("hunter2"));
}

#[test]
fn a_reload_takes_over_flip_token_and_level_and_names_the_rest() {
    let old = parse(GOOD).unwrap();
    let text = with("", "workers = 7\nlisten = \"127.0.0.1:7000\"\n")
        + "[flip]\ndrain_timeout = \"1s\"\n[log]\nlevel = \"debug\"\n[admin]\ntoken = { env = \"TOKEN\" }\n";
    let new = parse(&text).unwrap();
    let changes = old.changes(&new);
    let now: Vec<&str> = changes.iter().filter(|c| c.now).map(|c| c.key).collect();
    let later: Vec<&str> = changes.iter().filter(|c| !c.now).map(|c| c.key).collect();
    assert_eq!(now, ["admin.token", "[flip]", "log.level"]);
    assert!(later.contains(&"listen"));
    let merged = old.reloaded(&new);
    assert_eq!(merged.flip, new.flip);
    assert_eq!(merged.admin.token, new.admin.token);
    assert_eq!((merged.listen, merged.workers), (old.listen, old.workers));
    // Taking the token away from a port that others can reach is not taken over.
    let mut open = new.clone();
    open.admin.listen = "0.0.0.0:1".parse().unwrap();
    assert!(open.reloaded(&old).admin.token.is_some());
}

#[test]
fn a_users_pool_mode_counts_before_a_databases_and_that_before_the_rest() {
    let config = parse(&format!(
        "{GOOD}\n[pool]\npool_mode = \"transaction\"\nsession_databases = [\"app\"]\ntransaction_users = [\"web\"]\npool_size = 3"
    ));
    let pool = config.unwrap().pool;
    assert_eq!(pool.mode("web", "app"), PoolMode::Transaction);
    assert_eq!(pool.mode("other", "app"), PoolMode::Session);
    assert_eq!(pool.mode("other", "app2"), PoolMode::Transaction);
    assert_eq!(pool.pool_size, 3);
    let config = parse(&format!(
        "{GOOD}\n[pool]\nstatement_databases = [\"app\"]\nstatement_users = [\"web\"]\nsession_users = [\"root\"]"
    ));
    let pool = config.unwrap().pool;
    assert_eq!(pool.mode("web", "app2"), PoolMode::Statement);
    assert_eq!(pool.mode("other", "app"), PoolMode::Statement);
    assert_eq!(pool.mode("root", "app"), PoolMode::Session);
}

#[test]
fn a_limit_of_zero_is_none() {
    let limits = |keys: &str| parse(&format!("{GOOD}\n[limits]\n{keys}")).unwrap().limits;
    let none = limits("client_idle_timeout = \"0s\"");
    assert_eq!((none.client_idle_timeout, none.idle_transaction_timeout), (None, None));
    let some = limits("client_idle_timeout = \"1s\"\nidle_transaction_timeout = \"1m\"");
    let seconds = |n| Some(std::time::Duration::from_secs(n));
    assert_eq!(
        (some.client_idle_timeout, some.idle_transaction_timeout),
        (seconds(1), seconds(60))
    );
}

#[test]
fn who_logs_in_how_is_read_from_files_beside_the_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    let parse = |keys: &str| parse_with(&format!("{keys}\n{GOOD}"), &path, &env);
    let problems = |auth: &str| match parse_with(&format!("{GOOD}{auth}"), &path, &env) {
        Err(ConfigError::Invalid { problems, .. }) => problems,
        other => panic!("{auth}: {other:?}"),
    };
    write(
        "rules",
        "host all all 10.0.0.0/8 scram-sha-256\nhost all all all ldap\nhost all\n",
    );
    let found = problems("[auth]\nrules = \"rules\"\n");
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].what.starts_with("line 2 of ") && found[0].what.ends_with("the method ldap is not supported"));
    assert!(found[1].what.starts_with("line 3 of ") && found[1].fix == "Write: host DATABASE USER ADDRESS METHOD");
    assert_eq!(
        (found[0].key.as_str(), found[0].value.as_deref()),
        ("auth.rules", Some("\"rules\""))
    );
    write("rules", "host all all 10.0.0.0/8 scram-sha-256\n");
    write("users", "\"app\" \"hunter2-list\"\n");
    for (auth, what) in [
        ("rules = \"rules\"\nmethod = \"trust\"", "say that already"),
        ("rules = \"nowhere\"", "can't be read"),
        ("userlist = \"users\"", "not used"),
        ("query = \"select 1\"", "not used"),
        ("verifiers = \"userlist\"", "missing"),
        ("verifiers = \"file\"", "not one of the choices"),
        ("failures_max = -1", "out of range"),
    ] {
        let found = problems(&format!("[auth]\n{auth}\n"));
        assert!(found.len() == 1 && found[0].what.contains(what), "{auth}: {found:?}");
    }
    let whole =
        format!("{GOOD}[auth]\nrules = \"rules\"\nverifiers = \"userlist\"\nuserlist = \"users\"\nfailures_max = 3\n");
    let config = parse_with(&whole, &path, &env).unwrap();
    assert_eq!(config.auth.failures_max, 3);
    assert!(matches!(config.auth.verifiers, Verifiers::Userlist(_)));
    assert!(
        !format!("{config:?}").contains("hunter2-list"),
        "a password is not kept"
    );
    // What is taken over at once.
    write("rules", "host all all all trust\n");
    let new = parse_with(&whole, &path, &env).unwrap();
    let changes = config.changes(&new);
    assert!(
        changes.len() == 1 && changes[0].now && changes[0].key.contains("auth.rules"),
        "{changes:?}"
    );
    assert_eq!(config.reloaded(&new).auth, new.auth);

    let config =
        parse("unix_socket_dir = \".\"\nunix_socket_mode = \"0770\"\nproxy_protocol = [\"10.0.0.0/8\", \"::1\"]")
            .unwrap();
    assert_eq!(config.unix_socket.as_ref().unwrap().mode, 0o770);
    assert_eq!(config.proxy_protocol.len(), 2);
    for (keys, what) in [
        ("unix_socket_dir = \"nowhere\"".to_owned(), "no directory"),
        (format!("unix_socket_dir = \"{}\"", "x".repeat(100)), "too long"),
        ("unix_socket_dir = \".\"\nunix_socket_mode = \"rw\"".into(), "no mode"),
        ("unix_socket_dir = \".\"\nunix_socket_mode = \"1777\"".into(), "no mode"),
        ("proxy_protocol = [\"10.0.0.0/33\"]".into(), "no range"),
    ] {
        match parse(&keys) {
            Err(ConfigError::Invalid { problems, .. }) => assert!(problems[0].what.contains(what), "{problems:?}"),
            other => panic!("{keys}: {other:?}"),
        }
    }
}

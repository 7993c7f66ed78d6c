//! Roles after `replication start`: what is taken away on the active side is taken away on the standby, within seconds and
//! before a flip; what pgflip does with verifiers is told to nobody.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig};
use pgflip::config::Secret;
use pgflip::demo::cluster::{self, Cluster};
use pgflip::demo::ledger::Shape;
use pgflip::demo::sidecar::Sidecar;
use pgflip::pg::Side;
use serde_json::Value;

/// Whether a role of the server can log in with this password.
async fn opens(cluster: &Cluster, user: &str, password: &str) -> bool {
    let url = format!("postgresql://{user}:{password}@127.0.0.1:{}/postgres", cluster.port());
    cluster::connect(&url).await.is_ok()
}

/// Waits until a query of the server's answers true: what the guard does takes a few seconds.
async fn until(cluster: &Cluster, question: &str) {
    let client = cluster.connect("postgres").await.expect("a superuser's login");
    let end = Instant::now() + LIMIT;
    while !client
        .query_one(question, &[])
        .await
        .expect("an answer")
        .get::<_, bool>(0)
    {
        assert!(Instant::now() < end, "still not so: {question}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What `check` finds of the flip to come, as soon as the guard has seen that replication is set up.
pub async fn check(rig: &Rig) -> Vec<Value> {
    let deadline = Instant::now() + LIMIT;
    while rig.status().await["epoch"].as_u64().is_none_or(|epoch| epoch == 0) {
        assert!(Instant::now() < deadline, "the guard does not see the rows");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (_, answer) = rig.sidecar.get("/v1/check").await.expect("an answer");
    answer["findings"].as_array().cloned().unwrap_or_default()
}

/// Findings of `check` with one of these codes.
async fn findings(rig: &Rig, codes: &[&str]) -> Vec<String> {
    let all = check(rig).await;
    all.iter()
        .filter(|finding| codes.contains(&finding["code"].as_str().unwrap_or_default()))
        .map(ToString::to_string)
        .collect()
}

const ROLES: [&str; 4] = ["role_missing", "role_differs", "role_gone", "database_differs"];

fn small() -> Shape {
    Shape {
        tables: 2,
        rows: 5,
        accounts: 20,
    }
}

#[tokio::test]
async fn neither_passwords_nor_verifiers_are_in_the_log_at_the_loudest_level() {
    let mut rig = Rig::new(16, 18).shape(small()).start().await;
    let loud = "trace,tokio_postgres=trace";
    rig.sidecar.kill();
    let mut setup = rig.setup.clone();
    setup.log_level = loud.to_owned();
    rig.sidecar = Sidecar::start(setup).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    rig.admin(Side::Blue)
        .await
        .batch_execute("create role told login password 'never told'")
        .await
        .expect("a role");
    // SIGHUP with another level puts a new filter in place.
    let path = rig.sidecar.config_path();
    let config = std::fs::read_to_string(&path).expect("the configuration");
    let louder = config.replace(loud, "tokio_postgres=debug,trace");
    assert_ne!(config, louder);
    std::fs::write(&path, louder).expect("the configuration");
    rig.sidecar.signal(libc::SIGHUP);
    let end = Instant::now() + LIMIT;
    while !rig.sidecar.log().contains("SIGHUP: taken over") {
        assert!(Instant::now() < end, "{}", rig.sidecar.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    rig.replicate().await;
    let log = rig.sidecar.log();
    let passwords = [&rig.blue, &rig.green].map(|cluster| cluster.password().expose().to_owned());
    for secret in ["SCRAM-SHA-256$", "password=", "password '", "never told"]
        .into_iter()
        .chain(passwords.iter().map(String::as_str))
    {
        let told: Vec<&str> = log.lines().filter(|line| line.contains(secret)).take(2).collect();
        assert!(told.is_empty(), "{told:#?}");
    }
}

const MADE: &str = "
    create role team;
    create role boss superuser login password 'boss';
    create role dev login createdb password 'old';
    create role leaver login password 'leaver';
    create role forever login password 'x' valid until 'infinity';
    create role holder login createrole password 'holder';
    create table held (id int primary key);
    alter table held owner to holder;
    grant team to dev;
    set password_encryption = 'md5';
    create role oldstyle login password 'x';
    reset password_encryption;";

const TAKEN_AWAY: &str = "
    drop role boss;
    revoke team from dev;
    alter role dev nocreatedb password 'new' valid until '2100-01-01' connection limit 7;
    alter role dev set work_mem = '7MB';
    alter role dev in database app set statement_timeout = '1min';
    alter database app set lock_timeout = '2min';
    alter role leaver nologin;
    alter table held owner to postgres;
    drop role holder;
    revoke connect on database app from public;
    grant connect on database app to dev, ledger_app;";

async fn taken_away(blue: u32, green: u32) {
    let rig = Rig::new(blue, green).shape(small()).start().await;
    let (on_blue, on_green) = (
        rig.admin(Side::Blue).await,
        rig.green.connect("postgres").await.expect("a login"),
    );
    on_blue.batch_execute(MADE).await.expect("roles");
    on_green
        .batch_execute("create role of_green_only login password 'x'")
        .await
        .expect("a role");
    rig.replicate().await;
    for (user, password) in [
        ("boss", "boss"),
        ("dev", "old"),
        ("leaver", "leaver"),
        ("holder", "holder"),
    ] {
        assert!(opens(&rig.green, user, password).await, "{user} is on green");
    }
    let verifiers = "select string_agg(rolname || rolpassword, ' ' order by rolname) from pg_authid
                     where rolname in ('oldstyle', 'dev', 'forever')";
    let of = async |client: &tokio_postgres::Client| -> String {
        client.query_one(verifiers, &[]).await.expect("verifiers").get(0)
    };
    let here = of(&on_blue).await;
    assert!(here.contains("md5") && here.contains("SCRAM-SHA-256$"));
    assert_eq!(here, of(&on_green).await, "verbatim, md5 as well");
    assert_eq!(
        findings(&rig, &ROLES).await,
        Vec::<String>::new(),
        "VALID UNTIL 'infinity' among them"
    );

    on_blue.batch_execute(TAKEN_AWAY).await.expect("what is taken away");
    until(
        &rig.green,
        "select not exists (select from pg_roles where rolname = 'boss')",
    )
    .await;
    until(
        &rig.green,
        "select not rolcanlogin and not rolcreaterole and rolpassword is null from pg_authid where rolname = 'holder'",
    )
    .await;
    assert_eq!(findings(&rig, &ROLES).await, Vec::<String>::new());
    assert_eq!(
        findings(&rig, &["role_kept"]).await.len(),
        1,
        "holder still owns a table on green"
    );
    assert!(!opens(&rig.green, "dev", "old").await && opens(&rig.green, "dev", "new").await);
    assert!(!opens(&rig.green, "leaver", "leaver").await);
    assert!(
        opens(&rig.green, "of_green_only", "x").await,
        "what only the standby has is left alone"
    );
    assert_eq!(findings(&rig, &["role_only_there"]).await.len(), 1);
    let dev = "select not r.rolcreatedb and r.rolconnlimit = 7 and r.rolvaliduntil = '2100-01-01'
                      and not pg_has_role('dev', 'team', 'member')
                      and (select count(*) from pg_db_role_setting) = 3
                      and not has_database_privilege('forever', 'app', 'connect')
               from pg_authid r where r.rolname = 'dev'";
    assert!(on_green.query_one(dev, &[]).await.expect("an answer").get::<_, bool>(0));
}

#[tokio::test]
async fn what_is_taken_from_a_role_on_the_active_side_is_taken_on_the_standby_within_seconds() {
    taken_away(16, 18).await;
}

#[tokio::test]
async fn also_between_versions_whose_memberships_have_other_options() {
    taken_away(15, 17).await;
}

#[tokio::test]
async fn a_role_dropped_right_before_a_flip_opens_neither_side_after_it_and_the_way_back_is_free() {
    let rig = Rig::new(16, 18).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(
        "create role first superuser login password 'x'; create role second superuser login password 'x';",
    )
    .await
    .expect("roles");
    rig.replicate().await;
    assert!(opens(&rig.green, "first", "x").await && opens(&rig.green, "second", "x").await);
    blue.batch_execute("drop role first").await.expect("it is dropped");
    rig.cutover().await;
    assert!(!opens(&rig.green, "first", "x").await, "it was dropped before the flip");
    // `second` was blue's own, not made by pgflip there: it goes all the same, because green had it too.
    let green = rig.admin(Side::Green).await;
    green
        .batch_execute("drop role second; create role third login password 'x'")
        .await
        .expect("it is dropped");
    rig.rollback().await;
    assert!(
        !opens(&rig.blue, "second", "x").await,
        "it was dropped while green was active"
    );
    assert!(opens(&rig.blue, "third", "x").await, "what was made there came along");
}

#[tokio::test]
async fn what_is_done_to_roles_while_a_flip_makes_ready_counts_after_it() {
    // Right before anybody is held: roles have been mirrored for this flip.
    let fault = "stop-after=cutover:prepare";
    let rig = Rig::new(16, 18).shape(small()).fault(fault).start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(
        "create role dev login password 'old'; create role leaver login password 'x';
         create role expires login password 'x'; create role gone login password 'x';",
    )
    .await
    .expect("roles");
    rig.replicate().await;
    let mut command = rig.sidecar.command(&["cutover"]);
    let asked = command.stdout(Stdio::piped()).spawn().expect("the command starts");
    rig.stopped_itself(fault).await;
    blue.batch_execute(
        "alter role dev password 'new'; alter role leaver nologin; alter role expires valid until '2020-01-01';
         drop role gone; create role comer login password 'x';",
    )
    .await
    .expect("roles that change");
    rig.sidecar.signal(libc::SIGCONT);
    let said = asked.wait_with_output().expect("the command ends");
    assert!(said.status.success(), "{said:?}");
    for (user, password, right) in [
        ("dev", "new", true),
        ("comer", "x", true),
        ("dev", "old", false),
        ("leaver", "x", false),
        ("expires", "x", false),
        ("gone", "x", false),
    ] {
        assert_eq!(opens(&rig.green, user, password).await, right, "{user}, {password}");
    }
}

#[tokio::test]
async fn a_membership_that_another_role_granted_is_taken_away_as_well() {
    let rig = Rig::new(16, 18).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(
        "create role team; create role lead; create role member login; grant team to lead with admin option;
         set role lead; grant team to member; reset role;",
    )
    .await
    .expect("roles");
    rig.replicate().await;
    let green = rig.green.connect("postgres").await.expect("a login");
    green
        .batch_execute("set role lead; grant team to member; reset role")
        .await
        .expect("a second grant");
    let grants = "select count(*) from pg_auth_members where member = 'member'::regrole";
    assert_eq!(green.query_one(grants, &[]).await.expect("a count").get::<_, i64>(0), 2);
    blue.batch_execute("set role lead; revoke team from member; reset role")
        .await
        .expect("it is revoked");
    until(&rig.green, "select not pg_has_role('member', 'team', 'member')").await;
    assert_eq!(findings(&rig, &ROLES).await, Vec::<String>::new());
}

/// The statements of a mend, apart from words around them.
fn statements(mend: &str) -> Vec<&str> {
    let begins = |part: &str| {
        ["GRANT ", "ALTER ROLE "]
            .iter()
            .filter_map(|word| part.find(word))
            .min()
    };
    let parts = mend.split_inclusive(';').filter(|part| part.ends_with(';'));
    parts.filter_map(|part| Some(&part[begins(part)?..])).collect()
}

#[tokio::test]
async fn who_is_no_superuser_is_told_all_that_it_lacks_and_with_that_goes_there_and_back() {
    let mut rig = Rig::new(16, 18).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    let mut green = rig.green.connect("postgres").await.expect("a superuser's login");
    for client in [&blue, &green] {
        client
            .batch_execute("create role mover login password 'secret'")
            .await
            .expect("a role");
    }
    blue.batch_execute(
        "create role team; grant team to ledger_app; create role by login bypassrls; grant pg_monitor to by",
    )
    .await
    .expect("roles");
    green.batch_execute("create role team").await.expect("a role");
    rig.sidecar.kill();
    rig.setup.urls = [&rig.blue, &rig.green].map(|cluster| {
        let port = cluster.port();
        Secret::new(format!("postgresql://mover:secret@127.0.0.1:{port}?sslmode=disable"))
    });
    rig.sidecar = Sidecar::start(rig.setup.clone()).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    // What it says is done, and nothing else: then nothing is missing.
    let mut seen = BTreeSet::new();
    for round in 0.. {
        let found = rig.run(&["check"]).await.result()["findings"].clone();
        let found = found.as_array().expect("findings");
        if !found.iter().any(|finding| finding["severity"] == "blocker") {
            break;
        }
        assert!(round < 4, "{found:#?}");
        for finding in found {
            let of = |key: &str| finding[key].as_str().unwrap_or_default();
            let (code, mend) = (of("code"), of("mend"));
            seen.insert(code.to_owned());
            let on = if mend.starts_with("On blue") { &blue } else { &green };
            match code {
                "permission" if mend.contains("create each database") => {
                    let create = "create database app owner mover template template0";
                    on.batch_execute(create).await.expect("a database");
                    green = rig.green.connect("app").await.expect("a superuser's login");
                }
                "permission" | "roles_fixed" | "verifiers_logged" => {
                    let statements = statements(mend);
                    assert!(!statements.is_empty(), "{finding}");
                    for statement in statements {
                        on.batch_execute(statement)
                            .await
                            .unwrap_or_else(|e| panic!("{statement}: {e:?}"));
                    }
                }
                "superuser_owns" => {
                    assert!(of("what").contains("owns database app on blue"), "{finding}");
                    blue.batch_execute("alter database app owner to ledger_app")
                        .await
                        .expect("another owner");
                }
                "superuser_differs" => {
                    let verifier = "select format('alter role %I password %L', rolname, rolpassword) from pg_authid
                                    where oid = 10";
                    let same: String = blue.query_one(verifier, &[]).await.expect("a verifier").get(0);
                    on.batch_execute(&same).await.expect("the same");
                }
                "ddl_not_refused" | "way_untried" => {}
                _ => panic!("{finding}"),
            }
        }
    }
    for code in [
        "permission",
        "roles_fixed",
        "verifiers_logged",
        "superuser_owns",
        "ddl_not_refused",
    ] {
        assert!(seen.contains(code), "{code}: {seen:?}");
    }
    rig.replicate().await;
    rig.cutover().await;
    let client = rig.client().await;
    client
        .batch_execute("alter role ledger_app password 'new'; insert into attack_truncated values (1)")
        .await
        .expect("a write on green");
    // With the key that it has logged in with it could not be moved.
    drop(client);
    let end = Instant::now() + LIMIT;
    while rig.sidecar.get("/v1/sessions").await.expect("an answer").1["sessions"] != serde_json::json!([]) {
        assert!(Instant::now() < end, "its session does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    rig.rollback().await;
    assert!(opens(&rig.blue, "ledger_app", "new").await);
    let count = blue.query_one("select count(*) from attack_truncated", &[]).await;
    assert_eq!(count.expect("a count").get::<_, i64>(0), 1);
    let said = rig.run(&["replication", "stop", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    for client in [&blue, &green] {
        let left = "select to_regnamespace('pgflip') is null and not exists (select from pg_subscription)
                           and not exists (select from pg_replication_slots where slot_name ~ '^pgflip')";
        assert!(client.query_one(left, &[]).await.expect("an answer").get::<_, bool>(0));
    }
}

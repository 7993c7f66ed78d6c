//! Type OIDs: a copy gets its types with the OIDs that they have on the side that it is copied from, because drivers keep
//! them for as long as the application's process lives (DESIGN, "Type OIDs").
//!
//! No statement takes an OID. But a server hands them out from one counter ([`Counter`]), and what a statement takes from it,
//! in which order, is known: an enum takes one for its array type, the next one for itself. So before anything else is made
//! on an empty server, the types are, in the order of their OIDs: the counter is moved up to just below each, then the type is
//! made. How, is pg_dump's own text, entry by entry of its archive.
//!
//! Each type is a transaction of its own, so that a start that dies loses at most the one that it was about to make: the next
//! start finds the types by their names, and goes on. (In one transaction it would lose all of them: that is rolled back, the
//! counter is not.) A type that can't have its OID here (the counter is past it, or too far below; what it is made of comes
//! with the tables) is left to the copy of the schema, so that it costs no other type its own. Preflight names it.
//!
//! An extension makes its types itself. It is begun where its first type comes out right; the others then do if its script
//! takes as many OIDs between them as that which made them on the source. So it is made by the same script, in the source's
//! version, if the target still has that, and brought to the target's own version when all types are there.
//!
//! Row types of tables and views are left alone: the tables would have to be made one by one in the order in which they once
//! were, with the functions, sequences and types that they have come to need since, and no longer in one transaction. Base
//! types outside extensions (C functions of the user's own) are left alone too.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::GenericClient;

use super::schema::{self, Archive, Entry, SchemaError};
use super::state::{self, Expect, StateError};
use crate::fault;
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::oid_counter::{Counter, Tell};
use crate::pg::{Client, Ident, Literal};

/// Catalogs, by their OIDs, as they stand in an archive's list. They never change.
const TYPES: u32 = 1247;
const SCHEMAS: u32 = 2615;
const EXTENSIONS: u32 = 3079;

/// The first OID that is nobody's in a new server.
const FIRST: u32 = 16_384;
/// OIDs that have to be free for a type to be made out of its order, because another one is made of it.
const ROOM: u32 = 1_000;

/// Why types could not be made ahead: a server that is lost, or superseded. What a server refuses to make is no error here.
#[derive(Debug, thiserror::Error)]
pub enum OidError {
    /// A server went away, or refused a statement that it should know.
    #[error("making types ahead: {}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// The standby is not what it was.
    #[error(transparent)]
    State(#[from] StateError),
    /// pg_restore failed.
    #[error(transparent)]
    Schema(#[from] SchemaError),
}

/// A type that clients may know by its OID.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Type {
    oid: u32,
    array: u32,
    name: String,
    /// `pg_type.typtype`.
    kind: String,
    /// Not a shell.
    defined: bool,
    /// The extension that makes it, or 0.
    extension: u32,
    canonical: bool,
    /// For a domain that is NOT NULL the statement that makes it without that.
    nullable: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Extension {
    name: String,
    schema: String,
    version: String,
    /// Objects that belong to it.
    members: u32,
}

impl Extension {
    /// Makes it as pg_dump does, but in the version of the source.
    fn statement(&self) -> String {
        format!(
            "create extension if not exists {} with schema {} version {}",
            Ident::new(self.name.as_str()),
            Ident::new(self.schema.as_str()),
            Literal(&self.version)
        )
    }

    /// A member takes one OID, some a few more; and another version may have more members.
    fn room(&self) -> u32 {
        8 * (self.members + 100)
    }
}

/// What one database has.
#[derive(Clone, Debug)]
pub struct Contents {
    types: Vec<Type>,
    extensions: BTreeMap<u32, Extension>,
    schemas: BTreeMap<u32, String>,
    server: Features,
}

impl Contents {
    /// Reads the client's database.
    pub async fn read<C: GenericClient>(client: &C) -> Result<Contents, tokio_postgres::Error> {
        let types = client.query(include_str!("../pg/sql/types_to_keep.sql"), &[]).await?;
        let extensions = "select e.oid, e.extname::text, n.nspname::text, e.extversion,
                                 (select count(*)::int from pg_depend d
                                  where d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid)
                          from pg_extension e join pg_namespace n on n.oid = e.extnamespace";
        let extensions = client.query(extensions, &[]).await?;
        let schemas = client.query("select oid, nspname::text from pg_namespace", &[]).await?;
        let kind = |row: &tokio_postgres::Row| Type {
            oid: row.get("oid"),
            array: row.get("array_oid"),
            name: row.get("name"),
            kind: row.get("kind"),
            defined: row.get("defined"),
            extension: row.get("extension"),
            canonical: row.get("canonical"),
            nullable: row.get("nullable"),
        };
        let extension = |row: &tokio_postgres::Row| Extension {
            name: row.get(1),
            schema: row.get(2),
            version: row.get(3),
            members: row.get::<_, i32>(4).unsigned_abs(),
        };
        Ok(Contents {
            types: types.iter().map(kind).collect(),
            extensions: extensions.iter().map(|row| (row.get(0), extension(row))).collect(),
            schemas: schemas.iter().map(|row| (row.get(0), row.get(1))).collect(),
            server: Features::read(client).await?,
        })
    }

    /// There is no type here that anybody could know by its OID.
    pub fn has_no_types(&self) -> bool {
        self.types.is_empty()
    }

    fn named(&self, name: &str) -> Option<&Type> {
        self.types.iter().find(|one| one.name == name)
    }

    /// The types that come with an entry.
    fn types_of(&self, class: u32, oid: u32) -> impl Iterator<Item = &Type> {
        self.types.iter().filter(move |one| match class {
            TYPES => one.oid == oid && one.extension == 0,
            EXTENSIONS => one.extension == oid,
            _ => false,
        })
    }

    /// An entry of the source's archive is here already: an earlier start has made it, or somebody by hand.
    fn has(&self, from: &Contents, entry: &Entry) -> bool {
        match entry.class {
            TYPES => {
                let mut wanted = from.types_of(TYPES, entry.oid);
                wanted.any(|wanted| self.named(&wanted.name).is_some_and(|there| there.defined))
            }
            // The system's own are on both sides, and may have another owner.
            SCHEMAS if entry.oid >= FIRST => {
                let name = from.schemas.get(&entry.oid);
                name.is_some_and(|name| self.schemas.values().any(|there| there == name))
            }
            EXTENSIONS => {
                let wanted = from.extensions.get(&entry.oid);
                wanted.is_some_and(|wanted| self.extensions.values().any(|there| there.name == wanted.name))
            }
            _ => false,
        }
    }
}

/// One database on its way.
pub struct Database {
    name: String,
    target: Client,
    /// What the target's row has to say, if it has one yet.
    expect: Option<Expect>,
    archive: Archive,
    from: Contents,
    /// Entries that are there, and are left out when the schema is copied.
    made: BTreeSet<u32>,
    /// Types that are only named yet.
    shells: BTreeSet<String>,
    /// What makes each entry, as far as it has been read.
    scripts: BTreeMap<u32, String>,
    /// Extensions and their versions that the target has the scripts for.
    available: BTreeSet<(String, String)>,
    /// Why a type has not its OID.
    missed: BTreeMap<String, String>,
}

impl Database {
    /// One whose schema has not been copied yet. `expect`: what the target's row has to say, if it has one.
    pub async fn new(
        name: &str,
        from: Contents,
        target: Client,
        expect: Option<Expect>,
        archive: Archive,
    ) -> Result<Database, OidError> {
        let to = Contents::read(&*target).await?;
        let made = archive.entries.iter().filter(|entry| to.has(&from, entry));
        let shells = to.types.iter().filter(|one| !one.defined);
        let available = "select name::text, version from pg_available_extension_versions";
        let available = target.query(available, &[]).await?;
        Ok(Database {
            name: name.to_owned(),
            made: made.map(|entry| entry.id).collect(),
            shells: shells.map(|one| one.name.clone()).collect(),
            available: available.iter().map(|row| (row.get(0), row.get(1))).collect(),
            scripts: BTreeMap::new(),
            missed: BTreeMap::new(),
            target,
            expect,
            archive,
            from,
        })
    }

    /// When the types have been made.
    pub fn done(self) -> (String, Ahead) {
        let ahead = Ahead {
            archive: self.archive,
            made: self.made,
        };
        (self.name, ahead)
    }

    /// One transaction, which holds the target's row if it has one. `Ok(Err)`: the server refuses.
    async fn execute(&mut self, script: &str) -> Result<Result<(), String>, OidError> {
        let txn = self.target.transaction().await?;
        if let Some(expect) = &self.expect {
            state::lock(&txn, expect).await?;
        }
        let done = match txn.batch_execute(script).await {
            Ok(()) => Ok(txn.commit().await?),
            Err(error) if error.as_db_error().is_some() => {
                txn.rollback().await?;
                Err(describe(&error))
            }
            Err(error) => return Err(error.into()),
        };
        // A script sets what it needs for the whole session.
        self.target.batch_execute("reset all").await?;
        Ok(done)
    }

    /// OIDs that what an entry makes may take at most.
    fn room(&self, entry: u32) -> u32 {
        let entry = self.archive.entries.iter().find(|one| one.id == entry);
        match entry.map(|entry| (entry.class, self.from.extensions.get(&entry.oid))) {
            Some((SCHEMAS, _)) => 1,
            Some((EXTENSIONS, Some(extension))) => extension.room(),
            _ => ROOM,
        }
    }

    /// What makes an entry.
    async fn script(&self, entry: u32) -> Result<String, OidError> {
        match self.scripts.get(&entry) {
            Some(script) => Ok(script.clone()),
            None => Ok(self.archive.script(&[entry], false).await?),
        }
    }

    /// The statement that makes an extension by the source's own script, if the target has it: so its types come as they did
    /// there. [`Database::update`] brings it to the version that it would have got.
    fn same_version(&self, entry: u32) -> Option<String> {
        let entry = self.archive.entries.iter().find(|one| one.id == entry)?;
        let extension = self.from.extensions.get(&entry.oid);
        let extension = extension.filter(|_| entry.class == EXTENSIONS)?;
        let version = (extension.name.clone(), extension.version.clone());
        self.available.contains(&version).then(|| extension.statement())
    }

    /// Brings the extensions that have been made in the source's version to the target's own. What it refuses is told.
    async fn update(&mut self, tell: Tell<'_>) -> Result<(), OidError> {
        let statement = "select e.extname::text, e.extversion
                         from pg_extension e join pg_available_extensions a on a.name = e.extname
                         where e.extversion <> a.default_version";
        for row in self.target.query(statement, &[]).await? {
            let (name, version): (String, String) = (row.get(0), row.get(1));
            let of_source = |one: &Extension| one.name == name && one.version == version;
            if !self.from.extensions.values().any(of_source) {
                continue;
            }
            let update = format!("alter extension {} update", Ident::new(name.as_str()));
            if let Err(error) = self.execute(&update).await? {
                tell(format!("Extension {name} stays at the source's version: {error}"));
            }
        }
        Ok(())
    }

    /// Makes what an entry says, whatever OID comes next.
    async fn make(&mut self, entry: u32, counter: &mut Counter) -> Result<Result<(), String>, OidError> {
        let mut done = Err(String::new());
        if let Some(statement) = self.same_version(entry) {
            done = self.execute(&statement).await?;
        }
        if done.is_err() {
            let script = self.script(entry).await?;
            done = self.execute(&script).await?;
        }
        counter.look(&self.target).await?;
        if done.is_ok() {
            self.made.insert(entry);
        }
        Ok(done)
    }
}

/// How close to what is taken a type may have to come for it to matter what else takes an OID.
const CLOSE: u32 = 100;

/// True if there is a type on the source, and not on the target yet, whose OID is among the very next ones on the target: then
/// nothing else should take one. `pairs`: a database on the source, and on the target if it is there; `target`: any of its.
pub async fn at_hand(pairs: &[(&Client, Option<&Client>)], target: &Client) -> Result<bool, tokio_postgres::Error> {
    let mut counter = Counter::new(target).await?;
    for (_, there) in pairs {
        if let Some(there) = there {
            counter.look(there).await?;
        }
    }
    for (here, there) in pairs {
        let mut names = BTreeSet::new();
        if let Some(there) = there {
            // Then it is too late.
            if !schema::columns(&***there).await?.is_empty() {
                continue;
            }
            names.extend(Contents::read(&***there).await?.types.into_iter().map(|one| one.name));
        }
        let from = Contents::read(&***here).await?;
        let mut missing = from.types.iter().filter(|one| !names.contains(&one.name));
        if missing.any(|one| (counter.next()..counter.next().saturating_add(CLOSE)).contains(&one.oid)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What was made ahead in a database, and the archive that the rest comes from.
pub struct Ahead {
    archive: Archive,
    made: BTreeSet<u32>,
}

impl Ahead {
    /// What what was made ahead still lacks (owners: there were no roles yet), and what remains of the schema.
    pub async fn rest(&self, source: &Client) -> Result<(String, String), OidError> {
        let entries = self.archive.entries.iter();
        let (made, rest): (Vec<&Entry>, Vec<&Entry>) = entries.partition(|entry| self.made.contains(&entry.id));
        let of = |class| {
            let made = made.iter().filter(|entry| entry.class == class);
            made.map(|entry| entry.oid).collect::<Vec<_>>()
        };
        let statement = include_str!("../pg/sql/made_ahead.sql");
        let lacks = source.query(statement, &[&of(TYPES), &of(SCHEMAS)]).await?;
        let lacks: Vec<String> = lacks.iter().map(|row| row.get(0)).collect();
        let ids: Vec<u32> = rest.iter().map(|entry| entry.id).collect();
        Ok((lacks.join(";\n"), self.archive.script(&ids, true).await?))
    }
}

/// What is made at one place in the order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    /// A type or a schema, as pg_dump makes it.
    Entry,
    /// A domain that gets its NOT NULL later, by this statement.
    Nullable(String),
    /// A range of which only the OID is taken ahead: `CREATE TYPE` and this name. The schema's copy completes it.
    Shell(String),
    Extension,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    /// Index of its database.
    database: usize,
    entry: u32,
    class: u32,
    /// Its own OID on the source.
    oid: u32,
    /// The first OID that it takes, if everything about it is to be as on the source.
    first: u32,
    what: What,
    /// Entries that have to be made before, in that order.
    needs: Vec<u32>,
}

/// How a type is made, and the first OID that this takes. An array type comes right before its type; a composite's relation
/// before that; between a range and its array there are, from 14 on, its multirange and the array of that. `None`: so it is
/// not to be had.
fn way(one: &Type, from: Features, to: Features) -> Option<(u32, What)> {
    match one.kind.as_str() {
        "d" if from.domain_not_null_constraints() != to.domain_not_null_constraints() => {
            let nullable = one.nullable.clone().map(What::Nullable);
            Some((one.oid - 1, nullable.unwrap_or(What::Entry)))
        }
        "e" | "d" => Some((one.oid - 1, What::Entry)),
        "c" => Some((one.oid - 2, What::Entry)),
        "r" if from.multiranges() != to.multiranges() => None,
        "r" => Some((one.oid - if to.multiranges() { 3 } else { 1 }, What::Entry)),
        _ => None,
    }
}

/// Where an extension's own OID has to be so that its first type comes out as it is: where it is on the source, if the types
/// have come right after it (after a pg_upgrade they have not); else right before the first type, with which most begin.
fn first_of_extension<'a>(oid: u32, types: impl Iterator<Item = &'a Type>) -> Option<u32> {
    const SCRIPT: u32 = 10_000;
    let all = types.flat_map(|one| [one.oid, one.array]);
    let lowest = all.filter(|oid| *oid >= FIRST).min()?;
    Some(if oid < lowest && lowest - oid < SCRIPT {
        oid
    } else {
        lowest - 1
    })
}

/// Adds what an entry needs to `order`, deepest first, but for what is made. False: not all of it can be made ahead.
fn needs(
    entries: &BTreeMap<u32, &Entry>,
    entry: &Entry,
    made: &BTreeSet<u32>,
    possible: &BTreeSet<u32>,
    order: &mut Vec<u32>,
) -> bool {
    entry.needs.iter().all(|need| {
        let Some(needed) = entries
            .get(need)
            .filter(|_| !made.contains(need) && !order.contains(need))
        else {
            return true;
        };
        // Types don't depend on each other in a circle: what does, depends on a table or on a function.
        let can = possible.contains(need) && needs(entries, needed, made, possible, order);
        order.push(*need);
        can
    })
}

/// What can be made ahead in one database, in no order.
fn plan(database: usize, from: &Contents, to: Features, entries: &[Entry], made: &BTreeSet<u32>) -> Vec<Step> {
    let by_id: BTreeMap<u32, &Entry> = entries.iter().map(|entry| (entry.id, entry)).collect();
    let step = |entry: &Entry, first, what| Step {
        database,
        entry: entry.id,
        class: entry.class,
        oid: entry.oid,
        first,
        what,
        needs: Vec::new(),
    };
    let mut possible = BTreeSet::new();
    let mut steps = Vec::new();
    let mut shells = Vec::new();
    for entry in entries.iter().filter(|entry| !made.contains(&entry.id)) {
        let mut types = from.types_of(entry.class, entry.oid);
        match entry.class {
            SCHEMAS => {
                possible.insert(entry.id);
            }
            EXTENSIONS => {
                possible.insert(entry.id);
                let first = first_of_extension(entry.oid, types);
                steps.extend(first.map(|first| step(entry, first, What::Extension)));
            }
            TYPES => {
                let Some(one) = types.next() else { continue };
                if let Some((first, what)) = way(one, from.server, to) {
                    possible.insert(entry.id);
                    steps.push(step(entry, first, what));
                }
                if one.kind == "r" && !one.canonical {
                    shells.push(step(entry, one.oid, What::Shell(one.name.clone())));
                }
            }
            _ => {}
        }
    }
    steps.retain_mut(|step| needs(&by_id, by_id[&step.entry], made, &possible, &mut step.needs));
    let whole: BTreeSet<u32> = steps.iter().map(|step| step.entry).collect();
    let is_schema = |id: &u32| by_id.get(id).is_some_and(|entry| entry.class == SCHEMAS);
    for mut shell in shells.into_iter().filter(|shell| !whole.contains(&shell.entry)) {
        // It needs its schema and nothing else.
        let schemas = by_id[&shell.entry].needs.iter();
        let schemas = schemas.filter(|need| is_schema(need) && !made.contains(need));
        shell.needs.extend(schemas);
        steps.push(shell);
    }
    // Schemas have a place of their own: where there is no room between two types, they must not take it.
    let needs = steps.iter().flat_map(|step| step.needs.iter().copied());
    let schemas: BTreeSet<u32> = needs.filter(is_schema).collect();
    steps.extend(schemas.iter().map(|id| step(by_id[id], by_id[id].oid, What::Entry)));
    steps
}

/// How it went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Types with the same OIDs on both sides.
    pub same: usize,
    /// The others: database, type, why.
    pub others: Vec<(String, String, String)>,
}

/// Makes the types of all databases of the target, in the order of their OIDs: the counter is the server's.
pub async fn make(databases: &mut [Database], to: Features, tell: Tell<'_>) -> Result<Outcome, OidError> {
    let mut outcome = Outcome::default();
    let Some(one) = databases.first() else {
        return Ok(outcome);
    };
    let mut counter = Counter::new(&one.target).await?;
    let mut steps: Vec<Step> = Vec::new();
    for (index, one) in databases.iter_mut().enumerate() {
        counter.look(&one.target).await?;
        let plan = plan(index, &one.from, to, &one.archive.entries, &one.made);
        let entries = plan
            .iter()
            .flat_map(|step| step.needs.iter().copied().chain([step.entry]));
        let entries: BTreeSet<u32> = entries.collect();
        one.scripts = one.archive.scripts(&entries.into_iter().collect::<Vec<_>>()).await?;
        steps.extend(plan);
    }
    steps.sort_by_key(|step| (step.first, step.database, step.entry));
    let needs = |step: &Step| step.needs.iter().map(|need| (step.database, *need)).collect::<Vec<_>>();
    let needed: BTreeSet<(usize, u32)> = steps.iter().flat_map(needs).collect();
    let mut number = 0;
    let mut refused = None;
    // What could not have its own OIDs, though what comes later is made of it.
    let mut owed: Vec<Step> = Vec::new();
    for step in steps {
        if refused.is_none() && counter.beyond(step.first).is_none() {
            refused = pay(databases, &mut owed, step.first, &mut counter).await?;
        }
        let database = &mut databases[step.database];
        let done = match &refused {
            None => one_step(database, &step, &mut counter, tell).await?,
            // The copy of the schema is likely to meet the same, and then there will be another start: leave it its OIDs.
            Some(error) => Done::Left(format!("before it the server has refused: {error}")),
        };
        let why = match done {
            Done::Nothing => continue,
            Done::Made => {
                number += 1;
                fault::after("start", &format!("type-{number}"));
                continue;
            }
            Done::Left(why) => why,
            Done::Refused(error) => refused.insert(error).clone(),
        };
        for one in database.from.types_of(step.class, step.oid) {
            database.missed.insert(one.name.clone(), why.clone());
        }
        if needed.contains(&(step.database, step.entry)) {
            owed.push(step);
        }
    }
    for database in databases {
        database.update(tell).await?;
        compare(database, &mut outcome).await?;
    }
    Ok(outcome)
}

/// Makes what is owed, as far as there is room for it before `next`. Why the server has refused, if it has.
async fn pay(
    databases: &mut [Database],
    owed: &mut Vec<Step>,
    next: u32,
    counter: &mut Counter,
) -> Result<Option<String>, OidError> {
    while let Some(step) = owed.first() {
        let database = &mut databases[step.database];
        let missing = step.needs.iter().filter(|need| !database.made.contains(need));
        let all: Vec<u32> = missing.copied().chain([step.entry]).collect();
        let room: u32 = all.iter().map(|entry| database.room(*entry)).sum();
        if next.saturating_sub(counter.taken()) < room {
            break;
        }
        for entry in all {
            if let Err(error) = database.make(entry, counter).await? {
                return Ok(Some(error));
            }
        }
        owed.remove(0);
    }
    Ok(None)
}

enum Done {
    /// A schema, or what was there.
    Nothing,
    Made,
    Left(String),
    Refused(String),
}

async fn one_step(
    database: &mut Database,
    step: &Step,
    counter: &mut Counter,
    tell: Tell<'_>,
) -> Result<Done, OidError> {
    let there = match &step.what {
        What::Shell(name) => database.shells.contains(name),
        _ => database.made.contains(&step.entry),
    };
    if there {
        return Ok(Done::Nothing);
    }
    if step.class == SCHEMAS {
        let made = database.make(step.entry, counter).await?;
        return Ok(made.map_or_else(Done::Refused, |()| Done::Nothing));
    }
    if let Some(why) = counter.beyond(step.first) {
        return Ok(Done::Left(why));
    }
    // What has not been made though it is needed comes later in the order, or could not have its own OID.
    for need in &step.needs {
        if database.made.contains(need) {
            continue;
        }
        if step.first.saturating_sub(counter.taken()) < database.room(*need) {
            return Ok(Done::Left(
                "there is no room below it for what it is made of".to_owned(),
            ));
        }
        if let Err(error) = database.make(*need, counter).await? {
            return Ok(Done::Refused(error));
        }
    }
    let first = match step.what {
        What::Extension => aim(database, step, counter).await?,
        _ => step.first,
    };
    if counter.next() < first {
        counter.burn(&mut database.target, first, tell).await?;
    }
    if let Some(why) = counter.beyond(first) {
        return Ok(Done::Left(why));
    }
    let made = match &step.what {
        What::Entry | What::Extension => database.make(step.entry, counter).await?,
        What::Nullable(statement) => {
            let made = database.execute(statement).await?;
            if made.is_ok() {
                database.made.insert(step.entry);
            }
            made
        }
        // As format_type writes it: quoted.
        What::Shell(name) => database.execute(&format!("create type {name}")).await?,
    };
    counter.look(&database.target).await?;
    Ok(made.map_or_else(Done::Refused, |()| Done::Made))
}

/// Where an extension is to begin. Its script on the target may be another one than that which has made the types on the
/// source: where there is room, it is tried and rolled back, to see where its types come.
async fn aim(database: &mut Database, step: &Step, counter: &mut Counter) -> Result<u32, OidError> {
    let Some(extension) = database.from.extensions.get(&step.oid) else {
        return Ok(step.first);
    };
    if step.first.saturating_sub(counter.taken()) <= extension.room() {
        return Ok(step.first);
    }
    let script = match database.same_version(step.entry) {
        Some(statement) => statement,
        None => database.script(step.entry).await?,
    };
    let txn = database.target.transaction().await?;
    let tried = match txn.batch_execute(&script).await {
        Ok(()) => {
            let own = "select oid from pg_catalog.pg_extension where extname = $1";
            let own: u32 = txn.query_one(own, &[&extension.name]).await?.get(0);
            Some((own, Contents::read(&txn).await?))
        }
        Err(error) if error.as_db_error().is_some() => None,
        Err(error) => return Err(error.into()),
    };
    txn.rollback().await?;
    // What the trial has taken nothing shows any more.
    counter.take(&mut database.target, 1).await?;
    let place = tried.and_then(|(own, there)| {
        let wanted = database.from.types_of(EXTENSIONS, step.oid);
        best(own, &there, wanted, counter.taken())
    });
    Ok(place.unwrap_or(step.first))
}

/// The place of an extension's own OID, above `taken`, with which most of its types' OIDs come out as they are: the lowest
/// of equally good ones.
fn best<'a>(own: u32, there: &Contents, wanted: impl Iterator<Item = &'a Type>, taken: u32) -> Option<u32> {
    let mut votes: BTreeMap<u32, usize> = BTreeMap::new();
    for one in wanted {
        let Some(found) = there.named(&one.name) else { continue };
        for (wanted, found) in [(one.oid, found.oid), (one.array, found.array)] {
            let place = found.checked_sub(own).and_then(|behind| wanted.checked_sub(behind));
            if let Some(place) = place.filter(|place| *place > taken) {
                *votes.entry(place).or_default() += 1;
            }
        }
    }
    let most = votes.values().copied().max()?;
    votes
        .into_iter()
        .find(|(_, count)| *count == most)
        .map(|(place, _)| place)
}

/// Which types have the same OIDs now.
async fn compare(database: &Database, outcome: &mut Outcome) -> Result<(), OidError> {
    let to = Contents::read(&*database.target).await?;
    for one in &database.from.types {
        let missed = database.missed.get(&one.name).map(String::as_str);
        let why = match (to.named(&one.name), missed) {
            (Some(there), _) if (there.oid, there.array) == (one.oid, one.array) => {
                outcome.same += 1;
                continue;
            }
            (_, Some(why)) => why,
            (Some(there), None) if there.oid == one.oid => "its array type's OID can't be had there",
            (Some(_), None) if one.extension != 0 => "its extension makes its types in another way there",
            (Some(_), None) => "it was made before, or somebody else took that OID",
            (None, None) => "what it is made of comes with the tables",
        };
        let other = (database.name.clone(), one.name.clone(), why.to_owned());
        outcome.others.push(other);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(oid: u32, array: u32, name: &str, kind: &str) -> Type {
        Type {
            oid,
            array,
            name: name.into(),
            kind: kind.into(),
            defined: true,
            extension: 0,
            canonical: false,
            nullable: None,
        }
    }

    fn server(major: i32) -> Features {
        Features {
            version_num: major * 10_000,
        }
    }

    fn nothing(major: i32) -> Contents {
        Contents {
            types: Vec::new(),
            extensions: BTreeMap::new(),
            schemas: BTreeMap::new(),
            server: server(major),
        }
    }

    fn entry(id: u32, class: u32, oid: u32, needs: &[u32]) -> Entry {
        Entry {
            id,
            class,
            oid,
            needs: needs.to_vec(),
        }
    }

    #[test]
    fn what_comes_with_tables_or_functions_is_left_to_them_and_a_range_between_versions_gets_a_shell() {
        let mut hstore = one(20_002, 20_007, "public.hstore", "b");
        hstore.extension = 20_000;
        let from = Contents {
            types: vec![
                one(16_401, 16_400, "s.mood", "e"),
                one(16_500, 16_499, "s.pair", "c"),
                one(16_601, 16_600, "s.of_table", "c"),
                one(16_701, 16_700, "s.checked", "d"),
                one(16_801, 16_800, "s.span", "r"),
                hstore,
            ],
            ..nothing(13)
        };
        let entries = [
            entry(1, SCHEMAS, 16_390, &[]),
            entry(2, EXTENSIONS, 20_001, &[]),
            entry(3, EXTENSIONS, 20_000, &[2]),
            entry(4, 0, 0, &[3]),
            entry(5, TYPES, 16_401, &[1]),
            entry(6, TYPES, 16_500, &[1, 5, 3, 5]),
            entry(7, 1255, 16_650, &[1]),
            entry(8, TYPES, 16_701, &[7, 1]),
            entry(9, TYPES, 16_801, &[1]),
            entry(10, 1259, 16_590, &[1, 5]),
            entry(11, TYPES, 16_601, &[1, 10]),
            entry(12, SCHEMAS, 30_000, &[]),
        ];
        let planned = |to, made: &[u32]| {
            let mut steps = plan(0, &from, server(to), &entries, &made.iter().copied().collect());
            steps.sort_by_key(|step| step.first);
            let of = |step: Step| (step.entry, step.first, step.what, step.needs);
            steps.into_iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(
            planned(17, &[]),
            [
                (1, 16_390, What::Entry, vec![]),
                (5, 16_400, What::Entry, vec![1]),
                (6, 16_498, What::Entry, vec![1, 5, 2, 3]),
                (9, 16_801, What::Shell("s.span".into()), vec![1]),
                (3, 20_000, What::Extension, vec![2]),
            ]
        );
        assert_eq!(
            planned(13, &[1, 3, 5]),
            [(6, 16_498, What::Entry, vec![]), (9, 16_800, What::Entry, vec![])]
        );
    }

    #[test]
    fn a_domain_gets_its_not_null_later_where_that_takes_an_oid_and_did_not_on_the_source() {
        let mut domain = one(16_401, 16_400, "d", "d");
        assert_eq!(way(&domain, server(16), server(17)), Some((16_400, What::Entry)));
        domain.nullable = Some("create domain d as int".into());
        let later = What::Nullable("create domain d as int".into());
        assert_eq!(way(&domain, server(16), server(17)), Some((16_400, later)));
        assert_eq!(way(&domain, server(13), server(16)), Some((16_400, What::Entry)));
        assert_eq!(way(&domain, server(17), server(18)), Some((16_400, What::Entry)));
    }

    #[test]
    fn an_extension_begins_where_it_did_or_after_a_pg_upgrade_before_its_first_type() {
        let types = [one(16_401, 16_406, "hstore", "b"), one(16_485, 16_488, "ghstore", "b")];
        assert_eq!(first_of_extension(16_400, types.iter()), Some(16_400));
        assert_eq!(first_of_extension(16_395, types.iter()), Some(16_395));
        assert_eq!(first_of_extension(90_000, types.iter()), Some(16_400));
        assert_eq!(first_of_extension(16_400, types[..0].iter()), None);
    }

    #[test]
    fn an_extension_whose_script_differs_begins_where_most_of_its_types_come_out_as_they_are() {
        let wanted = [
            one(50_010, 50_015, "a", "b"),
            one(50_100, 50_104, "b", "b"),
            one(50_200, 0, "gone", "b"),
        ];
        let there = Contents {
            // Tried at 1000: `a` at once, `b` ten earlier than on the source.
            types: vec![one(1_001, 1_006, "a", "b"), one(1_081, 1_085, "b", "b")],
            ..nothing(17)
        };
        assert_eq!(best(1_000, &there, wanted.iter(), 40_000), Some(50_009));
        // The lower one is out of reach.
        assert_eq!(best(1_000, &there, wanted.iter(), 50_009), Some(50_019));
        assert_eq!(best(1_000, &there, wanted.iter(), 60_000), None);
    }
}

-- Everything pgflip keeps in a database: schema pgflip. Servers 13 and later. May be run again.
create schema if not exists pgflip;
revoke all on schema pgflip from public;
grant usage on schema pgflip to public;

-- The truth. One row a database and side. See DESIGN, "Who is right".
--   state:   active      clients write here
--            fenced      source of attempt `attempt`: nobody but replication writes here, may be unwound
--            committing  the same, and the pivot of `attempt` may have been committed on the target
--            standby     nobody but replication writes here
create table if not exists pgflip.state (
    one        boolean primary key default true check (one),
    side       text   not null check (side in ('blue', 'green')),
    carrier    text   not null,                        -- database that carries the epoch
    epoch      bigint not null check (epoch >= 1),     -- rises by one with every flip
    state      text   not null check (state in ('active', 'fenced', 'committing', 'standby')),
    attempt    bigint not null default 0,              -- highest attempt that touched this row
    burnt      bigint not null default 0,              -- attempts up to this one can never pivot here
    go_to      text   not null default '',             -- where writers are told to go while this side is fenced
    changed_at timestamptz not null default clock_timestamp()
);

-- To fence is to lock this table in EXCLUSIVE mode; every write of an armed table takes ROW EXCLUSIVE.
create table if not exists pgflip.gate ();

-- Rows written here on one side and seen on the other prove that everything before them has been applied.
create table if not exists pgflip.marker (
    n    bigint not null,                              -- random, so that an INSERT never conflicts
    side text   not null,                              -- where it was written
    at   timestamptz not null default clock_timestamp(),
    primary key (side, n)
);

-- What happened, newest last. Never replicated: each side and database tells its own story.
create table if not exists pgflip.history (
    id      bigint generated always as identity primary key,
    at      timestamptz not null default clock_timestamp(),
    epoch   bigint not null,
    attempt bigint not null,
    event   text   not null,
    detail  jsonb  not null default '{}'
);

-- Refuses writes while this side is fenced. Replication passes (initial copy, apply, pgflip's own repairs): they alone
-- run with a replication origin set up.
create or replace function pgflip.fence() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    row pgflip.state;
begin
    if pg_catalog.pg_replication_origin_session_is_setup() then
        return null;
    end if;
    lock table pgflip.gate in row exclusive mode;
    if pg_catalog.current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then
        select * into row from pgflip.state;
    else
        -- An old snapshot must fail (40001) rather than read an old state.
        select * into row from pgflip.state for share;
    end if;
    if row.state is distinct from 'active' then
        raise exception 'pgflip: % is not the active side: no write is accepted here', coalesce(row.side, 'this side')
            using errcode = 'read_only_sql_transaction',
                  detail = pg_catalog.format('Table %I.%I, database %I, epoch %s, state %s. Nothing was changed.',
                                             tg_table_schema, tg_table_name, pg_catalog.current_database(),
                                             row.epoch, row.state),
                  hint = coalesce(nullif(row.go_to, ''), 'Connect through pgflip, or to the active side.');
    end if;
    return null;
end
$$;
revoke all on function pgflip.fence() from public;

-- The same for DDL.
create or replace function pgflip.fence_ddl() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    row pgflip.state;
    context text;
begin
    if pg_catalog.pg_replication_origin_session_is_setup() then
        return;
    end if;
    -- A session's temporary objects are made on the standby before it becomes the active side (src/proxy/temporary.rs): one
    -- command that nothing else runs, and nothing that others see.
    get diagnostics context = pg_context;
    if tg_tag in ('CREATE TABLE', 'CREATE SEQUENCE', 'CREATE VIEW', 'CREATE INDEX', 'ALTER SEQUENCE')
       and pg_catalog.strpos(context, e'\n') = 0
       and pg_catalog.strpos(pg_catalog.current_query(), ';') = 0
       and pg_catalog.current_query() operator(pg_catalog.~*)
           ('^/\* pgflip: temporary \*/ (create temporary (table|sequence|view) |'
            || 'create (unique )?index ("([^"]|"")+"|[a-z0-9_$]+) on (only )?pg_temp\.|alter sequence pg_temp\.)') then
        return;
    end if;
    lock table pgflip.gate in row exclusive mode;
    if pg_catalog.current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then
        select * into row from pgflip.state;
    else
        select * into row from pgflip.state for share;
    end if;
    if row.state is distinct from 'active' then
        raise exception 'pgflip: % is not the active side: % is not accepted here', coalesce(row.side, 'this side'), tg_tag
            using errcode = 'read_only_sql_transaction',
                  detail = pg_catalog.format('Database %I, epoch %s, state %s. Nothing was changed.',
                                             pg_catalog.current_database(), row.epoch, row.state),
                  hint = coalesce(nullif(row.go_to, ''), 'Connect through pgflip, or to the active side.');
    end if;
end
$$;
revoke all on function pgflip.fence_ddl() from public;

-- First statement of every act that changes this side: holds its row still until the transaction ends and refuses the
-- act if the side is not what it expects. SHARE is enough to keep every transition out, and does not stand in the way
-- of REPEATABLE READ writers, who hold the same lock.
create or replace function pgflip.expect(states text[], at_epoch bigint) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    row pgflip.state;
begin
    select * into row from pgflip.state for share;
    if row.epoch is distinct from at_epoch or row.state <> all (states) then
        raise exception 'superseded: % is % at epoch %, expected % at epoch %',
                        coalesce(row.side, 'this side'), coalesce(row.state, 'unknown'), row.epoch, states, at_epoch
            using errcode = 'PF001';
    end if;
end
$$;
revoke all on function pgflip.expect(text[], bigint) from public;

-- A statement that is prepared where this hides the catalog of the same name, and used where it does not, is refused with
-- 0A000 as after DDL: that is how a client learns that the columns of a statement of its own differ here (src/proxy/transfer.rs).
create or replace view pgflip.pg_am as select true as changed;

-- Sidecars before these two servers: each keeps its row on the active side's carrier, once a second, and answers there
-- what it is called to do. A row whose session is gone, or that is old, is nobody's.
create table if not exists pgflip.sidecar (
    id            text primary key,                    -- random, one a process
    name          text not null,                       -- for people: where its clients connect
    pid           int not null,                        -- of the session that writes this row
    backend_start timestamptz not null,
    seen_at       timestamptz not null default clock_timestamp(),
    epoch         bigint not null,                     -- at which its clients are served; 0: not yet
    sessions      int not null,
    elsewhere     int not null,                        -- of them on the other side
    call          bigint not null default 0,           -- the call it has answered last
    step          text not null default '',            -- and the step of it
    ready         int not null default 0,
    obstacles     jsonb not null default '[]'
);

-- What the sidecar that flips asks of all others. It counts only while that session lives.
create table if not exists pgflip.call (
    one           boolean primary key default true check (one),
    n             bigint not null default 0,           -- rises by one with every flip
    epoch         bigint not null default 0,           -- at which the source is active
    step          text not null default 'over' check (step in ('prepare', 'hold', 'terminate', 'over')),
    target        text not null default 'green' check (target in ('blue', 'green')),
    drain_ms      bigint not null default 0,
    caller        text not null default '',
    pid           int not null default 0,
    backend_start timestamptz not null default clock_timestamp()
);
insert into pgflip.call default values on conflict do nothing;

-- Sides that were given up by force, as this side knows: what they hold is not what this one holds. No link may lead to
-- or from such a side before `replication start` has copied it anew.
create table if not exists pgflip.given_up (
    side  text primary key check (side in ('blue', 'green')),
    epoch bigint not null,                             -- at which this side became active without it
    at    timestamptz not null default clock_timestamp()
);

-- `finalize` has begun to take the links down, and has done it: in the carriers of both sides.
create table if not exists pgflip.finalized (
    one      boolean primary key default true check (one),
    epoch    bigint not null,
    began_at timestamptz not null default clock_timestamp(),
    done_at  timestamptz
);

-- Tables that are being copied to the standby anew (`resync`), as the active side knows: no link carries them meanwhile, and what
-- the standby has of them is not to be relied on.
create table if not exists pgflip.resync (
    schema  text    not null,
    name    text    not null,                          -- when it began
    epoch   bigint  not null,
    emptied boolean not null default false,            -- the standby's is empty, and published again: the copy may begin
    at      timestamptz not null default clock_timestamp(),
    relid   oid,                                       -- it may be renamed meanwhile
    token   text                                       -- random: whose note it is
);
-- Made by an earlier pgflip.
alter table pgflip.resync add column if not exists relid oid, add column if not exists token text,
    drop constraint if exists resync_pkey;

-- The verification that was begun last and has not come to its end, in the active side's carrier: where it stands (n = 0), and what it
-- has found of each table. For whoever goes on with it (`verify --resume`) when the process that kept it has ended.
create table if not exists pgflip.verification (
    id            bigint not null,                     -- random, one a verification
    n             int    not null,
    epoch         bigint not null,                     -- at which it compares
    place         text   not null,                     -- JSON
    pid           int,                                 -- of the session that keeps it
    backend_start timestamptz,
    at            timestamptz not null default clock_timestamp(),
    primary key (id, n)
);

-- Roles that this side has (or had) in common with the active side while it was standby: what the active side no longer
-- has of them is dropped here. A role that only the standby ever had is not among them, and stays.
create table if not exists pgflip.role_mirrored (
    name  text primary key,
    epoch bigint not null                              -- at which the active side had it last
);

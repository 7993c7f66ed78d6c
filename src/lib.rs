//! pgflip moves a live application from one Postgres to another, and back, without downtime.
//!
//! # The house
//!
//! A file imports only its own folder or a lower floor; only [`app`] sees everything.
//!
//! ```text
//! 4  main.rs        arguments, telemetry, signals, exit codes
//!    app.rs         wiring: config → gate → proxy → controller → admin; orderly shutdown
//!    cli/           one file a subcommand; talks to the admin port like any other client
//!    demo/          `pgflip demo`: throwaway servers, an application with a ledger, a flip there and back
//!    admin/         HTTP: route table, JSON types, error → status, metrics
//! 3  controller/    what an operator asks for: flip (THE LIST of steps), preflight, fence, links, lag, sequences,
//!                   copy … each usable alone; steps of a flip are thin. state: the rows that say who is right;
//!                   recovery: what to do from them alone; guard and upkeep: doing it, for ever; fleet: the other
//!                   sidecars; force: going on without a dead side; sessions: what binds clients to a server;
//!                   easing: writers slowed down until the target keeps up; verify/: whether both sides are equal, and stay so
//!                   (follow); guarantee: what of that a flip has to prove; resync/: making one table equal again; oids: the
//!                   same OIDs for types; rights: what pgflip's own role lacks; finalized: that a migration has ended
//! 2  proxy/         what a client goes through: listener, handshake, auth, session, boundary, gate, cancel; reactor: the
//!                   workers' sockets; verifiers: what passwords are checked with; failures: who guesses them; peer and unix:
//!                   who is at the other end; replication: what passes beside sessions; transfer, temporary and cursors: what
//!                   a session takes along; sharing, pool, suspects: clients that share servers; pace: connections made and
//!                   closed without haste; turns: who is let through in a drain because others wait for it; limits: who does
//!                   nothing for too long; seats: how many servers there may be
//! 1  wire/          bytes: scan headers, startup, SCRAM, md5, certificates, errors, statements under other names and what
//!                   deallocates them; no sockets inside
//!    pg/            the servers: Side, Lsn, Ident, connecting, server features, SQL (`pg/sql/*.sql`)
//! 0  config.rs      raw → validated, with pg_hba.conf's rules and the userlist; telemetry.rs  every metric's name and
//!                   meaning; fault.rs  test builds' switches
//! ```
//!
//! Client bytes go `listener → handshake → session ⇄ upstream`; an operator's request goes `admin → controller → step
//! → capability`. They meet at the [`proxy::gate`]. The proxy never imports the controller.
//!
//! # Invariants
//!
//! 1. The two databases hold the only durable state (schema `pgflip` on each side). pgflip keeps no file.
//! 2. The fence alone guarantees that no write is acknowledged by both sides or lost. The gate exists so that clients
//!    see no error, not so that data is safe.
//! 3. Unknown is never zero and never assumed: it is a value of its own and means "no go".
//! 4. Both directions are always ready, or the flip says so before it starts.
//! 5. The proxy never parses what it only has to pass on, never buffers a whole message (but one bounded copy of the
//!    last unnamed Parse), and gives every wait a limit.
//! 6. The data plane knows nothing of the controller.
//! 7. Many sidecars may stand before the same two servers; the databases coordinate them: all hold before one of them
//!    flips ([`controller::fleet`]).
//! 8. Servers 13 to 18, green never older than blue. Several databases flip together: the first listed is the carrier.

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod controller;
pub mod demo;
pub mod fault;
pub mod pg;
pub mod proxy;
pub mod telemetry;
pub mod wire;

//! Every error pgflip itself sends to a client: one place, so that each has the right SQLSTATE and says what to do.

use crate::config::rules::{Origin, Who};
use crate::wire::message;

/// How bad it is for the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The request failed.
    Error,
    /// The connection ends.
    Fatal,
}

/// An error for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientError {
    /// How bad.
    pub severity: Severity,
    /// SQLSTATE (PostgreSQL manual, appendix A).
    pub code: &'static str,
    /// What happened.
    pub message: String,
    /// More of it.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl ClientError {
    fn fatal(code: &'static str, message: impl Into<String>) -> ClientError {
        ClientError {
            severity: Severity::Fatal,
            code,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> ClientError {
        self.hint = Some(hint.into());
        self
    }

    fn detail(mut self, detail: impl Into<String>) -> ClientError {
        self.detail = Some(detail.into());
        self
    }

    /// Exactly Postgres's words, whatever was wrong with the password, the role or its expiry.
    pub fn wrong_password(user: &str) -> ClientError {
        ClientError::fatal("28P01", format!("password authentication failed for user \"{user}\""))
    }

    /// No rule fits, or one that refuses whom it fits: Postgres's words for its own `pg_hba.conf`.
    pub fn no_rule(who: &Who<'_>, rejected: bool) -> ClientError {
        let begin = if rejected {
            "pg_hba.conf rejects connection for"
        } else {
            "no pg_hba.conf entry for"
        };
        let host = match who.origin {
            Origin::Local => "[local]".to_owned(),
            Origin::Host(address) => address.to_string(),
        };
        let text = |name| String::from_utf8_lossy(name);
        let encryption = if who.tls { "SSL encryption" } else { "no encryption" };
        let (user, database) = (text(who.user), text(who.database));
        ClientError::fatal(
            "28000",
            format!("{begin} host \"{host}\", user \"{user}\", database \"{database}\", {encryption}"),
        )
        .detail("These are pgflip's rules (auth.rules), not the server's.")
    }

    /// A rule asks for a client certificate.
    pub fn no_certificate() -> ClientError {
        ClientError::fatal("28000", "connection requires a valid client certificate")
            .hint("Give the client a certificate (sslcert, sslkey) of an authority that pgflip knows (tls.client_ca).")
    }

    /// `what` (Postgres's word for the method) shows somebody else.
    pub fn not_this_user(what: &str, user: &str) -> ClientError {
        ClientError::fatal("28000", format!("{what} authentication failed for user \"{user}\""))
    }

    /// A rule says `password`, and others could read it on its way.
    pub fn password_needs_tls() -> ClientError {
        ClientError::fatal("28000", "pgflip takes passwords in clear over TLS only")
            .hint("Connect with sslmode=require.")
    }

    /// `auth.failures_max` of one address.
    pub fn too_many_failures(wait: std::time::Duration) -> ClientError {
        let seconds = wait.as_secs() + 1;
        ClientError::fatal("28000", "too many failed logins from this address")
            .hint(format!("Try again in {seconds} s, with another password."))
    }

    /// A load balancer that does not say whom it speaks for.
    pub fn no_proxy_header() -> ClientError {
        ClientError::fatal("08P01", "expected a PROXY protocol header, version 2")
            .hint("Have the load balancer send one, or take its address out of pgflip's proxy_protocol.")
    }

    /// Direct TLS without ALPN: it may be another protocol's client that somebody has led here.
    pub fn no_alpn() -> ClientError {
        ClientError::fatal(
            "08P01",
            "received direct SSL connection request without ALPN protocol negotiation extension",
        )
    }

    /// A message that breaks the protocol.
    pub fn protocol(what: impl Into<String>) -> ClientError {
        ClientError::fatal("08P01", what)
    }

    /// Bytes that came before TLS was up (CVE-2021-23222): somebody put them there.
    pub fn bytes_before_tls() -> ClientError {
        ClientError::fatal("08P01", "received unencrypted data after SSL request")
            .detail("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.")
    }

    /// A protocol other than 3.
    pub fn unsupported_protocol(major: u16, minor: u16) -> ClientError {
        ClientError::fatal(
            "0A000",
            format!("unsupported frontend protocol {major}.{minor}: pgflip supports 3.0 to 3.2"),
        )
    }

    /// StartupMessage without a user.
    pub fn no_user() -> ClientError {
        ClientError::fatal("28000", "no PostgreSQL user name specified in startup packet")
    }

    /// `[tls] required`.
    pub fn tls_required() -> ClientError {
        ClientError::fatal("28000", "pgflip accepts only TLS connections").hint("Connect with sslmode=require.")
    }

    /// Physical replication is no client's of a database.
    pub fn replication_connection() -> ClientError {
        ClientError::fatal("0A000", "pgflip does not carry physical replication connections")
            .hint("Connect to the server itself. Logical ones (replication=database) are carried.")
    }

    /// Not one of the databases that flip together.
    pub fn unknown_database(database: &str) -> ClientError {
        ClientError::fatal("3D000", format!("database \"{database}\" is not served by pgflip"))
            .hint("Add it to `databases` in pgflip's config, or connect to the server itself.")
    }

    /// `limits.max_clients` reached.
    pub fn too_many_clients(max: usize) -> ClientError {
        ClientError::fatal("53300", "sorry, too many clients already").hint(format!(
            "pgflip serves {max} clients at once: raise limits.max_clients."
        ))
    }

    /// SASL that pgflip does not offer, or none.
    pub fn sasl(what: impl Into<String>) -> ClientError {
        ClientError::fatal("08P01", what)
    }

    /// No way to check who the client is, now.
    pub fn verifiers_unavailable() -> ClientError {
        ClientError::fatal("57P03", "pgflip can't reach the active server to check who logs in")
            .hint("Try again. Logins wait while clients are held, and not for a server that is down: `pgflip status` says which.")
    }

    /// `pool.query_wait_timeout`: every server of the pool was busy for so long.
    pub fn no_server_free(after: std::time::Duration) -> ClientError {
        ClientError::fatal(
            "57014",
            format!("no server connection became free within {after:?} (pool.query_wait_timeout)"),
        )
        .hint(
            "Nothing of this request was run. Raise pool.pool_size, or look for long transactions: `pgflip sessions`.",
        )
    }

    /// `pool.query_wait_timeout`, and this client's own server would be one more than `pool.max_db_connections` or
    /// `pool.max_user_connections`.
    pub fn no_seat(after: std::time::Duration) -> ClientError {
        ClientError::fatal(
            "53300",
            format!("no server connection became free within {after:?} (pool.query_wait_timeout)"),
        )
        .hint("Others have as many as pool.max_db_connections or pool.max_user_connections allows: `pgflip sessions`.")
    }

    /// `limits.client_idle_timeout`: PgBouncer's words, Postgres's code.
    pub fn idle(after: std::time::Duration) -> ClientError {
        ClientError::fatal("57P05", "client_idle_timeout").detail(format!(
            "The client has sent nothing for longer than {after:?} (pgflip's limits.client_idle_timeout)."
        ))
    }

    /// `limits.idle_transaction_timeout`: the same.
    pub fn idle_in_transaction(after: std::time::Duration) -> ClientError {
        ClientError::fatal("25P03", "idle transaction timeout").detail(format!(
            "The client has left a transaction open and sent nothing for longer than {after:?} \
             (pgflip's limits.idle_transaction_timeout). The transaction is rolled back."
        ))
    }

    /// `pool_mode = "statement"`: PgBouncer's words. Its code, 08P01, would have clients connect and try again.
    ///
    /// `more`: it has sent requests behind it that the server has got, perhaps a COMMIT.
    pub fn transaction_block(more: bool) -> ClientError {
        ClientError::fatal("0A000", "transaction blocks not allowed in statement pooling mode")
            .detail(match more {
                false => "The transaction is rolled back.",
                true => "What was sent behind it has reached the server, so the transaction may have been committed.",
            })
            .hint("Use no transactions, or give this user or database pool_mode = \"transaction\" (pool.transaction_users).")
    }

    /// `limits.client_login_timeout`: PgBouncer's words.
    pub fn login_timeout(after: std::time::Duration) -> ClientError {
        ClientError::fatal("57014", "client_login_timeout").detail(format!(
            "The login was not over within {after:?} (pgflip's limits.client_login_timeout)."
        ))
    }

    /// `pool.max_bound_clients`, and one more client holds what no other may get.
    pub fn too_many_bound(why: &str, max: usize) -> ClientError {
        ClientError::fatal(
            "53300",
            "too many clients keep a server connection to themselves (pool.max_bound_clients)",
        )
        .detail(format!("This one would, because of what it holds: {why}."))
        .hint(format!(
            "{max} clients may at once. Raise that, or give such clients pool_mode = \"session\" (pool.session_users)."
        ))
    }

    /// The role, or the database, lets nobody in any more.
    pub fn not_let_in(code: &'static str, message: String) -> ClientError {
        ClientError::fatal(code, message)
    }

    /// What a client has set can't be set on the server that it was to get.
    pub fn settings(why: &str) -> ClientError {
        ClientError::fatal("08006", "pgflip can't give a server connection this session's settings").detail(why)
    }

    /// Nobody knows yet which side is active, or a flip takes longer than new clients are to wait.
    pub fn not_now(known: bool) -> ClientError {
        let message = if known {
            "pgflip holds new transactions for longer than limits.hold_timeout"
        } else {
            "pgflip does not know yet which server is active"
        };
        ClientError::fatal("57P03", message).hint("Try again; `pgflip status` says what it waits for.")
    }

    /// The server can't be reached. Says the side, never a host or a password.
    pub fn server_unreachable(side: crate::pg::Side) -> ClientError {
        ClientError::fatal("08006", format!("pgflip can't reach the active server ({side})"))
            .hint("Try again; pgflip's log says why.")
    }

    /// The server asked for something that the client's proof does not give.
    pub fn server_authentication(side: crate::pg::Side, what: &str) -> ClientError {
        ClientError::fatal(
            "28000",
            format!("the server ({side}) asks pgflip for {what}, which it can't answer"),
        )
        .hint("Let the server's pg_hba.conf ask for scram-sha-256 from pgflip's address.")
    }

    /// A server was to check a password and lets in whoever comes.
    pub fn not_checked(side: crate::pg::Side) -> ClientError {
        ClientError::fatal(
            "28000",
            format!("the server ({side}) asks pgflip for no password, so that none can be checked there"),
        )
        .hint("Let the server's pg_hba.conf ask for scram-sha-256 from pgflip's address.")
    }

    /// The server's connection ended without a word.
    pub fn server_gone(side: crate::pg::Side) -> ClientError {
        ClientError::fatal(
            "08006",
            format!("the server ({side}) closed the connection unexpectedly"),
        )
        .hint("Connect again: new connections go to the active server.")
    }

    /// The session could not be moved to the new active side.
    pub fn not_moved(why: &str) -> ClientError {
        ClientError::fatal(
            "57P01",
            "terminating connection: this session can't be moved to the new active server",
        )
        .detail(why.to_owned())
        .hint("Connect again: new connections go to the active server.")
    }

    /// An operator (or `stragglers = "terminate"`) ended the session.
    pub fn terminated(why: &str) -> ClientError {
        ClientError::fatal("57P01", "terminating connection due to administrator command").detail(why.to_owned())
    }

    /// pgflip stops.
    pub fn shutting_down() -> ClientError {
        ClientError::fatal("57P01", "terminating connection due to administrator command")
            .detail("pgflip is shutting down.")
    }

    /// A cancel request for a request that was held: it was never sent.
    pub fn canceled() -> ClientError {
        ClientError {
            severity: Severity::Error,
            code: "57014",
            message: "canceling statement due to user request".into(),
            detail: None,
            hint: None,
        }
    }

    /// As ErrorResponse.
    pub fn encode(&self, into: &mut Vec<u8>) {
        let severity = match self.severity {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
        };
        message::put(into, b'E', |body| {
            let mut field = |kind: u8, text: &str| {
                body.push(kind);
                // A zero byte would end the field early.
                body.extend(text.bytes().filter(|byte| *byte != 0));
                body.push(0);
            };
            field(b'S', severity);
            field(b'V', severity);
            field(b'C', self.code);
            field(b'M', &self.message);
            if let Some(detail) = &self.detail {
                field(b'D', detail);
            }
            if let Some(hint) = &self.hint {
                field(b'H', hint);
            }
            body.push(0);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_back_as_it_was_meant() {
        let mut bytes = Vec::new();
        ClientError::unknown_database("shop").encode(&mut bytes);
        assert_eq!(bytes[0], b'E');
        assert_eq!(
            u32::from_be_bytes(bytes[1..5].try_into().unwrap()) as usize,
            bytes.len() - 1
        );
        let fields = message::ErrorFields(&bytes[5..]);
        assert_eq!(fields.field(b'C'), Some(&b"3D000"[..]));
        assert_eq!(fields.field(b'S'), Some(&b"FATAL"[..]));
        assert_eq!(
            fields.field(b'M'),
            Some(&b"database \"shop\" is not served by pgflip"[..])
        );
    }
}

//! Everything that would stop `replication start` or a flip, found before anything is touched. All that is wrong is
//! said, not just the first, each with the statement that mends it; what can't be read is a blocker.

use std::fmt;

use serde::Serialize;

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is begun while there is one.
    Blocker,
    /// The operator should know; nothing is stopped by it.
    Warning,
}

/// One thing that is wrong: what, what it means, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// For programs: stable, `snake_case`.
    pub code: &'static str,
    /// The database, if it is about one.
    pub database: Option<String>,
    /// What is so, with names.
    pub what: String,
    /// What would happen because of it.
    pub means: String,
    /// What to do; a statement where there is one.
    pub mend: String,
}

impl Finding {
    /// Stops what was asked for.
    pub fn blocker(
        code: &'static str,
        what: impl Into<String>,
        means: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding {
            severity: Severity::Blocker,
            code,
            database: None,
            what: what.into(),
            means: means.into(),
            mend: mend.into(),
        }
    }

    /// Stops nothing.
    pub fn warning(
        code: &'static str,
        what: impl Into<String>,
        means: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding { severity: Severity::Warning, ..Finding::blocker(code, what, means, mend) }
    }

    /// It is about this database.
    pub fn of(mut self, database: &str) -> Finding {
        self.database = Some(database.to_owned());
        self
    }

    /// True if it stops what was asked for.
    pub fn stops(&self) -> bool {
        self.severity == Severity::Blocker
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Blocker => "blocker",
            Severity::Warning => "warning",
        };
        write!(f, "{severity} {}", self.code)?;
        if let Some(database) = &self.database {
            write!(f, " (database {database})")?;
        }
        write!(f, ": {} {} {}", self.what, self.means, self.mend)
    }
}

/// Why something an operator asked for was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// What happened.
    pub what: String,
    /// What it means for the data and for clients.
    pub means: String,
    /// What to do next.
    pub next: String,
    /// What preflight found, if it was preflight.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

impl Failure {
    /// A failure that preflight did not find.
    pub fn new(what: impl Into<String>, means: impl Into<String>, next: impl Into<String>) -> Failure {
        Failure { what: what.into(), means: means.into(), next: next.into(), findings: Vec::new() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.what, self.means, self.next)?;
        for finding in &self.findings {
            write!(f, "\n- {finding}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Everything that would stop `replication start`.
pub async fn for_replication(_config: &crate::config::Config) -> Vec<Finding> {
    Vec::new()
}

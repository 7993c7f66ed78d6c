//! What a server can do, by its version: the one file that compares `server_version_num`.

use serde::Serialize;

/// Facts about one server's version. Everything else in pgflip asks for a fact, never for a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Features {
    /// `server_version_num`: 160014 is 16.14.
    pub version_num: i32,
}

impl Features {
    /// The oldest major version that pgflip serves.
    pub const OLDEST: i32 = 13;
    /// The newest one that it has been tried with.
    pub const NEWEST: i32 = 18;

    /// Asks a server.
    pub async fn read<C: tokio_postgres::GenericClient>(client: &C) -> Result<Features, tokio_postgres::Error> {
        let row = client
            .query_one("select current_setting('server_version_num')::int", &[])
            .await?;
        Ok(Features {
            version_num: row.get(0),
        })
    }

    /// 16 of 16.14.
    pub fn major(self) -> i32 {
        self.version_num / 10_000
    }

    /// As people write it: `16.14`.
    pub fn version(self) -> String {
        format!("{}.{}", self.major(), self.version_num % 10_000)
    }

    /// A version that pgflip serves.
    pub fn supported(self) -> bool {
        (Features::OLDEST..=Features::NEWEST).contains(&self.major())
    }

    fn from(self, major: i32) -> bool {
        self.major() >= major
    }

    /// The initial copy of a table runs with a replication origin, so that the fence lets it pass.
    pub fn copy_has_origin(self) -> bool {
        self.from(14)
    }
    /// Setting `idle_session_timeout`.
    pub fn idle_session_timeout(self) -> bool {
        self.from(14)
    }
    /// Subscriptions know `streaming`.
    pub fn streaming(self) -> bool {
        self.from(14)
    }
    /// View `pg_stat_progress_copy`.
    pub fn copy_progress(self) -> bool {
        self.from(14)
    }
    /// Ranges come with multiranges.
    pub fn multiranges(self) -> bool {
        self.from(14)
    }
    /// Publications know column lists; subscriptions know `two_phase` and `disable_on_error`.
    pub fn column_lists(self) -> bool {
        self.from(15)
    }
    /// Databases know their locale provider.
    pub fn locale_provider(self) -> bool {
        self.from(15)
    }
    /// View `pg_stat_subscription_stats`.
    pub fn subscription_errors(self) -> bool {
        self.from(15)
    }
    /// Subscriptions know `origin = none`.
    pub fn origin_filter(self) -> bool {
        self.from(16)
    }
    /// Subscriptions know `streaming = parallel`.
    pub fn streaming_parallel(self) -> bool {
        self.from(16)
    }
    /// `pg_log_standby_snapshot()`: what else only a checkpoint does.
    pub fn log_standby_snapshot(self) -> bool {
        self.from(16)
    }
    /// Role `pg_create_subscription`: subscriptions of others than superusers.
    pub fn create_subscription_role(self) -> bool {
        self.from(16)
    }
    /// A link writes as the owner of each table; before, as the subscription's.
    pub fn links_write_as_owner(self) -> bool {
        self.from(16)
    }
    /// Memberships know INHERIT and SET.
    pub fn membership_options(self) -> bool {
        self.from(16)
    }
    /// The numbers of `pg_stat_get_backend_idset()` are those of temporary schemas.
    pub fn temporary_schemas_are_numbered(self) -> bool {
        self.from(16)
    }
    /// Databases know ICU rules.
    pub fn icu_rules(self) -> bool {
        self.from(16)
    }
    /// Locale provider `builtin`; the locale's column is `datlocale`.
    pub fn builtin_locale(self) -> bool {
        self.from(17)
    }
    /// NOT NULL of a domain is a constraint, with a name and an OID.
    pub fn domain_not_null_constraints(self) -> bool {
        self.from(17)
    }
    /// The right MAINTAIN on tables.
    pub fn maintain(self) -> bool {
        self.from(17)
    }
    /// Setting `transaction_timeout`, which pg_dump from 17 on writes into every dump.
    pub fn transaction_timeout(self) -> bool {
        self.from(17)
    }
    /// Replication origins have a limit of their own, not that of the slots.
    pub fn origins_setting(self) -> &'static str {
        if self.from(18) {
            "max_active_replication_origins"
        } else {
            "max_replication_slots"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_number_becomes_facts() {
        let fifteen = Features { version_num: 150020 };
        assert_eq!((fifteen.major(), fifteen.version().as_str()), (15, "15.20"));
        assert!(fifteen.column_lists() && !fifteen.origin_filter());
        assert_eq!(fifteen.origins_setting(), "max_replication_slots");
        let eighteen = Features { version_num: 180004 };
        assert!(eighteen.origin_filter() && eighteen.supported());
        assert_eq!(eighteen.origins_setting(), "max_active_replication_origins");
        assert!(!Features { version_num: 120022 }.supported());
        assert!(!Features { version_num: 190000 }.supported());
    }
}

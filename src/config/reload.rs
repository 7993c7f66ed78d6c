//! What a running pgflip takes over from a changed configuration (SIGHUP), and what needs a restart.

use super::Config;

/// A key whose value differs between two configurations. Values are not shown: they may be secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Key, with its section.
    pub key: &'static str,
    /// True if it takes effect at once; otherwise a restart is needed.
    pub now: bool,
}

impl Config {
    /// Compares field by field.
    pub fn changes(&self, new: &Config) -> Vec<Change> {
        // Taken apart so that a new field can't be forgotten here.
        let Config {
            listen,
            unix_socket,
            proxy_protocol,
            workers,
            databases,
            blue,
            green,
            admin,
            auth,
            client_tls,
            flip,
            verify,
            limits,
            pool,
            custom_settings,
            pg_bin,
            log_format,
            log_level,
        } = self;
        let compared = [
            ("listen", false, *listen != new.listen),
            (
                "unix_socket_dir, unix_socket_mode",
                false,
                *unix_socket != new.unix_socket,
            ),
            ("proxy_protocol", false, *proxy_protocol != new.proxy_protocol),
            ("workers", false, *workers != new.workers),
            ("databases", false, *databases != new.databases),
            ("[blue]", false, *blue != new.blue),
            ("[green]", false, *green != new.green),
            ("admin.listen", false, admin.listen != new.admin.listen),
            ("admin.token", true, admin.token != new.admin.token),
            ("auth.method, auth.rules", true, auth.rules != new.auth.rules),
            ("auth.verifiers", true, auth.verifiers != new.auth.verifiers),
            (
                "auth.failures_max, auth.failures_window",
                true,
                (auth.failures_max, auth.failures_window) != (new.auth.failures_max, new.auth.failures_window),
            ),
            ("[tls]", false, *client_tls != new.client_tls),
            ("[flip]", true, *flip != new.flip),
            ("[verify]", false, *verify != new.verify),
            ("[limits]", false, *limits != new.limits),
            ("[pool]", false, *pool != new.pool),
            ("custom_settings", false, *custom_settings != new.custom_settings),
            ("pg_bin", false, *pg_bin != new.pg_bin),
            ("log.format", false, *log_format != new.log_format),
            ("log.level", true, *log_level != new.log_level),
        ];
        compared
            .into_iter()
            .filter(|(_, _, differs)| *differs)
            .map(|(key, now, _)| Change { key, now })
            .collect()
    }

    /// This configuration with everything from `new` that takes effect at once. The admin token is taken over only if
    /// the port, which stays as it is, would still be allowed with it.
    pub fn reloaded(&self, new: &Config) -> Config {
        let mut config = self.clone();
        config.flip = new.flip.clone();
        config.auth = new.auth.clone();
        config.log_level = new.log_level.clone();
        if new.admin.token.is_some() || self.admin.listen.ip().is_loopback() {
            config.admin.token = new.admin.token.clone();
        }
        config
    }
}

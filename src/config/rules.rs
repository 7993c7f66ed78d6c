//! Who may log in, from where, and how: rules in the format of `pg_hba.conf` (PostgreSQL manual, 20.1). The first one that
//! fits decides, and who fits none is refused.
//!
//! Names of certificates and of the operating system can be mapped to users, in the format of `pg_ident.conf` (20.2).
//!
//! Everything that Postgres would read otherwise than pgflip can is refused here by its line, never skipped: a rule that does
//! not count lets in whom the next one does.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// The rules of a file, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// From 1. 0: of no file, but of `auth.method`.
    pub line: usize,
    connection: Connection,
    databases: Vec<Database>,
    /// Empty: all.
    users: Vec<Vec<u8>>,
    addresses: Addresses,
    /// How.
    pub method: Method,
    /// What is asked of the client's certificate besides.
    pub certificate: Certificate,
    /// With `map=`: whom the certificate's or the operating system's names may log in as. Else as themselves.
    map: Option<Vec<Mapping>>,
}

/// A line of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    theirs: Vec<u8>,
    /// `None`: as any.
    user: Option<Vec<u8>>,
}

/// The maps of a file, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps(BTreeMap<String, Vec<Mapping>>);

/// What a configuration says besides, that rules depend on.
#[derive(Clone, Debug, Default)]
pub struct Around {
    /// TLS is spoken to clients.
    pub tls: bool,
    /// An authority of clients' certificates is known.
    pub ca: bool,
    /// `auth.ident`, if there is one.
    pub maps: Option<Maps>,
}

/// How somebody who fits shows who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Not at all.
    Trust,
    /// It is refused.
    Reject,
    /// SCRAM-SHA-256.
    Scram,
    /// By an md5 hash, if that is what the role has, else by SCRAM-SHA-256.
    Md5,
    /// By its password in clear.
    Password,
    /// By a client certificate whose common name is the user's.
    Cert,
    /// By the operating system's user at the other end of a Unix socket.
    Peer,
}

/// `clientcert=…`, beside any method on `hostssl` lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// Nothing is asked.
    Any,
    /// There has to be one (that it is of the authority is checked wherever one is shown).
    VerifyCa,
    /// The same, and its common name is the user's.
    VerifyFull,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Connection {
    Local,
    Host,
    HostSsl,
    HostNoSsl,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Database {
    All,
    SameUser,
    Named(Vec<u8>),
    /// `replication`: of connections that pgflip does not carry.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Addresses {
    All,
    /// Of a Unix socket: the line names none.
    Local,
    In(Network),
}

/// Addresses with the same first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u32,
}

/// Where a client comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A Unix socket.
    Local,
    /// This address.
    Host(IpAddr),
}

/// Who wants to log in.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    /// From where.
    pub origin: Origin,
    /// Over TLS.
    pub tls: bool,
    /// As it was named: not necessarily UTF-8.
    pub database: &'a [u8],
    /// The same.
    pub user: &'a [u8],
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// From 1.
    pub line: usize,
    /// What.
    pub what: String,
    /// What to write instead.
    pub fix: String,
}

impl Network {
    /// `10.0.0.0/8`, or an address by itself. `None`: neither.
    pub fn parse(text: &str) -> Option<Network> {
        let (address, bits) = match text.split_once('/') {
            None => (text, None),
            // No sign, no blank.
            Some((address, bits)) if bits.bytes().all(|b| b.is_ascii_digit()) => (address, Some(bits.parse().ok()?)),
            Some(_) => return None,
        };
        let address: IpAddr = address.parse().ok()?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(all);
        (bits <= all).then_some(Network { address, bits })
    }

    /// Whether an address is one of them. An IPv4 address that came to an IPv6 listener is an IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let differ = ours.to_bits() ^ theirs.to_bits();
                differ.checked_shr(32 - self.bits).unwrap_or(0) == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let differ = ours.to_bits() ^ theirs.to_bits();
                differ.checked_shr(128 - self.bits).unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    fn is_loopback(&self) -> bool {
        match self.address {
            IpAddr::V4(address) => address.is_loopback() && self.bits >= 8,
            IpAddr::V6(address) => address.is_loopback() && self.bits == 128,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Origin {
    /// Nobody else can listen in between.
    pub fn is_this_machine(self) -> bool {
        match self {
            Origin::Local => true,
            Origin::Host(address) => address.to_canonical().is_loopback(),
        }
    }
}

impl Rule {
    /// Whether who has this name by its certificate, or for the operating system, may log in as this user.
    pub fn lets_be(&self, theirs: &[u8], user: &[u8]) -> bool {
        match &self.map {
            None => theirs == user,
            Some(map) => map
                .iter()
                .any(|mapping| mapping.theirs == theirs && mapping.user.as_ref().is_none_or(|mapped| mapped == user)),
        }
    }

    fn fits(&self, who: &Who<'_>) -> bool {
        let connection = match (self.connection, who.origin) {
            (Connection::Local, Origin::Local) => true,
            (Connection::Local, Origin::Host(_)) | (_, Origin::Local) => false,
            (Connection::Host, _) => true,
            (Connection::HostSsl, _) => who.tls,
            (Connection::HostNoSsl, _) => !who.tls,
        };
        let address = match (self.addresses, who.origin) {
            (Addresses::In(network), Origin::Host(address)) => network.contains(address),
            (Addresses::All | Addresses::Local, _) => true,
            (Addresses::In(_), Origin::Local) => false,
        };
        connection
            && address
            && self.databases.iter().any(|database| match database {
                Database::All => true,
                Database::SameUser => who.database == who.user,
                Database::Named(name) => name == who.database,
                Database::None => false,
            })
            && (self.users.is_empty() || self.users.iter().any(|user| user == who.user))
    }
}

impl Rules {
    /// The same method for everybody.
    pub fn everybody(method: Method) -> Rules {
        let rule = |connection, addresses| Rule {
            line: 0,
            connection,
            databases: vec![Database::All],
            users: Vec::new(),
            addresses,
            method,
            certificate: Certificate::Any,
            map: None,
        };
        Rules(vec![
            rule(Connection::Local, Addresses::Local),
            rule(Connection::Host, Addresses::All),
        ])
    }

    /// The first rule that fits.
    pub fn find(&self, who: &Who<'_>) -> Option<&Rule> {
        self.0.iter().find(|rule| rule.fits(who))
    }

    /// Whether some line's method is this one.
    pub fn use_method(&self, method: Method) -> bool {
        self.0.iter().any(|rule| rule.method == method)
    }

    /// Whether anybody on another machine may be let in without showing anything.
    pub fn trust_others(&self) -> bool {
        self.0.iter().any(|rule| {
            rule.method == Method::Trust
                && rule.certificate == Certificate::Any
                && rule.databases != [Database::None]
                && match rule.addresses {
                    Addresses::All => true,
                    Addresses::Local => false,
                    Addresses::In(network) => !network.is_loopback(),
                }
        })
    }

    /// Whether some line asks for a client's certificate.
    pub fn ask_for_certificates(&self) -> bool {
        self.0
            .iter()
            .any(|rule| rule.method == Method::Cert || rule.certificate != Certificate::Any)
    }

    /// Reads a file's text.
    pub fn parse(text: &str, around: &Around) -> Result<Rules, Vec<Wrong>> {
        let (mut rules, mut wrong) = (Vec::new(), Vec::new());
        for (line, text) in lines(text) {
            let read = fields(&text).and_then(|fields| match fields.as_slice() {
                [] => Ok(None),
                _ => rule(line, &fields, around).map(Some),
            });
            match read {
                Ok(rule) => rules.extend(rule),
                Err((what, fix)) => wrong.push(Wrong { line, what, fix }),
            }
        }
        if rules.is_empty() && wrong.is_empty() {
            wrong.push(Wrong {
                line: 1,
                what: "there is no rule: nobody could log in".into(),
                fix: "Write one, such as: host all all all scram-sha-256".into(),
            });
        }
        if wrong.is_empty() { Ok(Rules(rules)) } else { Err(wrong) }
    }
}

impl Maps {
    /// Reads a file's text.
    pub fn parse(text: &str) -> Result<Maps, Vec<Wrong>> {
        let (mut maps, mut wrong) = (Maps::default(), Vec::new());
        for (line, text) in lines(text) {
            let read = fields(&text).and_then(|fields| match fields.as_slice() {
                [] => Ok(()),
                fields => mapping(fields).map(|(name, mapping)| maps.0.entry(name).or_default().push(mapping)),
            });
            if let Err((what, fix)) = read {
                wrong.push(Wrong { line, what, fix });
            }
        }
        if wrong.is_empty() { Ok(maps) } else { Err(wrong) }
    }
}

fn mapping(fields: &[Vec<Token>]) -> Result<(String, Mapping), Line> {
    let [name, theirs, user] = fields else {
        return bad(
            format!("there are {} fields, not three", fields.len()),
            "Write: MAP NAME USER",
        );
    };
    let (name, theirs, user) = (single(name, "map")?, single(theirs, "name")?, single(user, "user")?);
    if theirs.keyword().starts_with('/') || user.keyword().starts_with('/') {
        return bad("regular expressions are not supported", "Write a line for each name");
    }
    if user.keyword().starts_with('+') {
        return bad(
            "pgflip does not know who is a member of what",
            "Write a line for each user",
        );
    }
    if name.keyword().starts_with("include") {
        return bad("other files can't be included", "Write their lines here");
    }
    let mapping = Mapping {
        theirs: theirs.text.as_bytes().to_vec(),
        user: (user.keyword() != "all").then(|| user.text.as_bytes().to_vec()),
    };
    Ok((name.text.clone(), mapping))
}

/// Lines with the number of their first; a backslash at the end joins the next one.
fn lines(text: &str) -> Vec<(usize, String)> {
    let mut all: Vec<(usize, String)> = Vec::new();
    let mut goes_on = false;
    for (n, line) in text.split('\n').enumerate() {
        let line = line.strip_suffix('\r').unwrap_or(line);
        let (line, more) = match line.strip_suffix('\\') {
            Some(line) => (line, true),
            None => (line, false),
        };
        match all.last_mut() {
            Some((_, last)) if goes_on => last.push_str(line),
            _ => all.push((n + 1, line.to_owned())),
        }
        goes_on = more;
    }
    all
}

/// One name of a list: in quotes it is nothing but a name.
#[derive(Debug, PartialEq, Eq)]
struct Token {
    text: String,
    quoted: bool,
}

impl Token {
    fn keyword(&self) -> &str {
        if self.quoted { "" } else { &self.text }
    }
}

type Line = (String, String);

fn bad<T>(what: impl Into<String>, fix: impl Into<String>) -> Result<T, Line> {
    Err((what.into(), fix.into()))
}

/// A line's fields, each a list of names with commas between them (src/backend/libpq/hba.c, `next_token`).
fn fields(line: &str) -> Result<Vec<Vec<Token>>, Line> {
    let mut fields: Vec<Vec<Token>> = Vec::new();
    let mut characters = line.chars().peekable();
    // After a comma the list goes on, blanks or not.
    let mut goes_on = false;
    loop {
        while characters.next_if(|c| c.is_whitespace()).is_some() {}
        let Some(&first) = characters.peek() else { break };
        if first == '#' {
            break;
        }
        let (mut text, mut in_quotes, quoted, mut comma) = (String::new(), false, first == '"', false);
        while let Some(&c) = characters.peek() {
            if !in_quotes && (c.is_whitespace() || c == '#') {
                break;
            }
            characters.next();
            match c {
                ',' if !in_quotes => {
                    comma = true;
                    break;
                }
                // Two of them are one.
                '"' if in_quotes && characters.next_if_eq(&'"').is_some() => text.push('"'),
                '"' => in_quotes = !in_quotes,
                c => text.push(c),
            }
        }
        if in_quotes {
            return bad("a quotation mark is not closed", "Close it on the same line");
        }
        if !text.is_empty() || quoted {
            let token = Token { text, quoted };
            match fields.last_mut() {
                Some(list) if goes_on => list.push(token),
                _ => fields.push(vec![token]),
            }
        } else if comma && !goes_on {
            return bad("a comma stands alone", "Write lists like a,b");
        }
        goes_on = comma;
    }
    if goes_on {
        return bad("a list ends with a comma", "Leave it out");
    }
    Ok(fields)
}

const TYPES: &str = "Write local, host, hostssl or hostnossl";
const METHODS: &str = "Write trust, reject, scram-sha-256, md5, password, cert or peer";

fn single<'a>(field: &'a [Token], what: &str) -> Result<&'a Token, Line> {
    match field {
        [one] => Ok(one),
        _ => bad(
            format!("the {what} is a list"),
            format!("Write one {what}, and a line for each"),
        ),
    }
}

fn rule(line: usize, fields: &[Vec<Token>], around: &Around) -> Result<Rule, Line> {
    let (first, mut rest) = fields.split_first().expect("a line without a field is no rule");
    let connection = match single(first, "type")?.keyword() {
        "local" => Connection::Local,
        "host" => Connection::Host,
        "hostssl" => Connection::HostSsl,
        "hostnossl" => Connection::HostNoSsl,
        "hostgssenc" => {
            return bad(
                "pgflip does not speak GSSAPI: no client could fit",
                "Leave the line out",
            );
        }
        "hostnogssenc" => return bad("pgflip does not speak GSSAPI: every client fits", "Write host"),
        "include" | "include_if_exists" | "include_dir" => {
            return bad("other files can't be included", "Write their lines here");
        }
        other => return bad(format!("{other:?} is no type of connection"), TYPES),
    };
    let mut next = |what: &str| match rest.split_first() {
        Some((field, after)) => {
            rest = after;
            Ok(field.as_slice())
        }
        None => bad(
            format!("the line ends before its {what}"),
            if connection == Connection::Local {
                "Write: local DATABASE USER METHOD"
            } else {
                "Write: host DATABASE USER ADDRESS METHOD"
            },
        ),
    };
    let databases = next("database")?.iter().map(database).collect::<Result<_, _>>()?;
    let users = users(next("user")?)?;
    let addresses = match connection {
        Connection::Local => Addresses::Local,
        _ => addresses(&mut next)?,
    };
    let method = method(single(next("method")?, "method")?.keyword())?;
    let (mut certificate, mut map) = (Certificate::Any, None);
    for option in rest {
        let option = &single(option, "option")?.text;
        match (option.as_str(), method) {
            ("clientcert=verify-ca", m) if m != Method::Cert => certificate = Certificate::VerifyCa,
            ("clientcert=verify-full", _) => certificate = Certificate::VerifyFull,
            ("clientcert=verify-ca", _) => {
                return bad(
                    "cert checks the name as well",
                    "Leave the option out, or write clientcert=verify-full",
                );
            }
            (other, Method::Cert | Method::Peer) if other.starts_with("map=") => {
                let name = &other["map=".len()..];
                let Some(maps) = &around.maps else {
                    return bad(
                        "there are no maps: auth.ident is not set",
                        "Set it to a file like pg_ident.conf",
                    );
                };
                match maps.0.get(name) {
                    Some(found) => map = Some(found.clone()),
                    None => {
                        return bad(
                            format!("auth.ident has no map {name:?}"),
                            "Write its lines there: MAP NAME USER",
                        );
                    }
                }
            }
            (other, _) if other.starts_with("map=") => {
                return bad("only names of cert and peer are mapped", "Leave the option out");
            }
            (other, _) => {
                return bad(
                    format!("the option {other:?} is unknown"),
                    "Write map=…, clientcert=verify-ca or clientcert=verify-full, or leave it out",
                );
            }
        }
    }

    let over_tls = connection == Connection::HostSsl;
    if over_tls && !around.tls {
        return bad(
            "no client could fit: there is no [tls] in the configuration",
            "Give pgflip a certificate in [tls], or write host",
        );
    }
    match method {
        Method::Cert if !over_tls => return bad("certificates are shown over TLS only", "Write hostssl"),
        Method::Peer if connection != Connection::Local => {
            return bad("peer is for Unix sockets only", "Write local, or another method");
        }
        Method::Password
            if connection == Connection::HostNoSsl && !matches!(addresses, Addresses::In(n) if n.is_loopback()) =>
        {
            return bad(
                "passwords would cross the network in clear",
                "Write hostssl, or scram-sha-256",
            );
        }
        _ => {}
    }
    if certificate != Certificate::Any && !over_tls {
        return bad(
            "certificates are shown over TLS only",
            "Write hostssl, or leave clientcert out",
        );
    }
    if (certificate != Certificate::Any || method == Method::Cert) && !around.ca {
        return bad(
            "no certificate could be checked: tls.client_ca is not set",
            "Set it to the authority that signs clients' certificates",
        );
    }
    Ok(Rule {
        line,
        connection,
        databases,
        users,
        addresses,
        method,
        certificate,
        map,
    })
}

fn database(token: &Token) -> Result<Database, Line> {
    Ok(match token.keyword() {
        "all" => Database::All,
        "sameuser" => Database::SameUser,
        "replication" => Database::None,
        "samerole" | "samegroup" => {
            return bad(
                "pgflip does not know who is a member of what",
                "Name the databases and users",
            );
        }
        name if name.starts_with('@') => return bad("other files can't be included", "Write their names here"),
        name if name.starts_with('/') => {
            return bad("regular expressions are not supported", "Name the databases");
        }
        _ => Database::Named(token.text.as_bytes().to_vec()),
    })
}

fn users(field: &[Token]) -> Result<Vec<Vec<u8>>, Line> {
    let mut users = Vec::new();
    for token in field {
        match token.keyword() {
            "all" => return Ok(Vec::new()),
            name if name.starts_with('+') => {
                return bad("pgflip does not know who is a member of what", "Name the users");
            }
            name if name.starts_with('@') => return bad("other files can't be included", "Write their names here"),
            name if name.starts_with('/') => return bad("regular expressions are not supported", "Name the users"),
            _ => users.push(token.text.as_bytes().to_vec()),
        }
    }
    Ok(users)
}

fn addresses<'a>(next: &mut impl FnMut(&str) -> Result<&'a [Token], Line>) -> Result<Addresses, Line> {
    const FIX: &str = "Write it like 10.0.0.0/8, 10.0.0.0 255.0.0.0, fd00::/8, or all";
    let token = single(next("address")?, "address")?;
    match token.keyword() {
        "all" => return Ok(Addresses::All),
        "samehost" | "samenet" => {
            return bad(
                format!("{} is not supported", token.text),
                "Write the addresses (of this machine: 127.0.0.1/32 and ::1/128)",
            );
        }
        _ => {}
    }
    if token.text.contains('/') {
        return match Network::parse(&token.text) {
            Some(network) => Ok(Addresses::In(network)),
            None => bad(format!("{:?} is no range of addresses", token.text), FIX),
        };
    }
    let Ok(address) = token.text.parse::<IpAddr>() else {
        return bad(
            format!("{:?} is no address (host names are not looked up)", token.text),
            FIX,
        );
    };
    let mask = single(next("mask")?, "mask")?;
    let bits = match (address, mask.text.parse()) {
        (IpAddr::V4(_), Ok(IpAddr::V4(mask))) if mask.to_bits().count_ones() == mask.to_bits().leading_ones() => {
            mask.to_bits().leading_ones()
        }
        (IpAddr::V6(_), Ok(IpAddr::V6(mask))) if mask.to_bits().count_ones() == mask.to_bits().leading_ones() => {
            mask.to_bits().leading_ones()
        }
        _ => return bad(format!("{:?} is no mask of {address}", mask.text), FIX),
    };
    Ok(Addresses::In(Network { address, bits }))
}

fn method(name: &str) -> Result<Method, Line> {
    Ok(match name {
        "trust" => Method::Trust,
        "reject" => Method::Reject,
        "scram-sha-256" => Method::Scram,
        "md5" => Method::Md5,
        "password" => Method::Password,
        "cert" => Method::Cert,
        "peer" => Method::Peer,
        "gss" | "sspi" | "ident" | "ldap" | "radius" | "pam" | "bsd" | "oauth" => {
            return bad(format!("the method {name} is not supported"), METHODS);
        }
        other => return bad(format!("{other:?} is no method"), METHODS),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn around(tls: bool, ca: bool) -> Around {
        let maps = "staff ann app # a comment\nstaff \"bob b\" \"all\"\nroots root all\n";
        Around {
            tls,
            ca,
            maps: Some(Maps::parse(maps).unwrap()),
        }
    }

    fn parse(text: &str) -> Rules {
        Rules::parse(text, &around(true, true)).unwrap_or_else(|wrong| panic!("{text}\n{wrong:?}"))
    }

    fn who<'a>(from: &str, tls: bool, database: &'a str, user: &'a str) -> Who<'a> {
        Who {
            origin: match from {
                "local" => Origin::Local,
                address => Origin::Host(address.parse().unwrap()),
            },
            tls,
            database: database.as_bytes(),
            user: user.as_bytes(),
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = parse(
            "# TYPE DATABASE USER ADDRESS METHOD\n\
             local all postgres peer\n\
             local \"app\",other all scram-sha-256 # the rest\n\
             hostssl sameuser all 10.1.0.0/16 cert\n\
             hostnossl all all 10.0.0.0 255.0.0.0 reject\n\
             host all ann, bob \\\n   fd00::/8 md5\n\
             \n\
             host replication all all trust\n\
             hostssl all \"all\" 0.0.0.0/0 password\n\
             host all all 127.0.0.1/32 trust\n",
        );
        for (from, tls, database, user, line) in [
            ("local", false, "app", "postgres", Some(2)),
            ("local", false, "other", "ann", Some(3)),
            ("local", false, "third", "ann", None),
            ("10.1.2.3", true, "ann", "ann", Some(4)),
            ("10.1.2.3", true, "app", "ann", None),
            ("10.2.2.3", true, "ann", "ann", None),
            ("10.2.2.3", false, "ann", "ann", Some(5)),
            ("fdff::1", false, "app", "bob", Some(6)),
            ("fdff::1", false, "app", "eve", None),
            // In quotes a name is a name; and who is called that is not everybody.
            ("1.2.3.4", true, "app", "all", Some(10)),
            ("1.2.3.4", true, "app", "eve", None),
            ("1.2.3.4", false, "replication", "eve", None),
            ("127.0.0.1", false, "app", "eve", Some(11)),
            ("::ffff:127.0.0.1", false, "app", "eve", Some(11)),
            ("127.0.0.2", false, "app", "eve", None),
            ("::1", false, "app", "eve", None),
        ] {
            let found = rules.find(&who(from, tls, database, user)).map(|rule| rule.line);
            assert_eq!(found, line, "{from} {tls} {database} {user}");
        }
        assert!(!rules.trust_others() && rules.use_method(Method::Cert) && rules.ask_for_certificates());
    }

    #[test]
    fn a_line_that_can_not_be_kept_is_named_with_its_number_and_a_remedy() {
        for (text, what, fix) in [
            (
                "host all all 1.2.3.4/32 ldap ldapserver=x",
                "ldap is not supported",
                "scram-sha-256",
            ),
            (
                "host all all 1.2.3.4/32 scram",
                "\"scram\" is no method",
                "scram-sha-256",
            ),
            ("hosts all all all trust", "\"hosts\" is no type", "hostssl"),
            ("hostgssenc all all all gss", "GSSAPI", "Leave the line out"),
            ("hostnogssenc all all all trust", "GSSAPI", "host"),
            ("include other.conf", "included", "here"),
            ("host all all 1.2.3.4/33 trust", "no range", "10.0.0.0/8"),
            ("host all all 1.2.3.4/+3 trust", "no range", "10.0.0.0/8"),
            ("host all all 1.2.3.4 255.0.255.0 trust", "no mask", "255.0.0.0"),
            ("host all all 1.2.3.4 trust", "no mask", "10.0.0.0/8"),
            ("host all all db.example trust", "not looked up", "10.0.0.0/8"),
            ("host all all samehost trust", "samehost", "127.0.0.1/32"),
            ("host all all samenet trust", "samenet", "addresses"),
            ("host all +staff all trust", "member", "Name the users"),
            ("host samerole all all trust", "member", "Name the databases"),
            ("host @dbs all all trust", "included", "here"),
            ("host all @users all trust", "included", "here"),
            ("host /^a all all trust", "regular", "Name"),
            ("host all /^a all trust", "regular", "Name"),
            (
                "host all all",
                "ends before its address",
                "host DATABASE USER ADDRESS METHOD",
            ),
            ("local all", "ends before its user", "local DATABASE USER METHOD"),
            ("local all all", "ends before its method", "local DATABASE USER METHOD"),
            ("local all all cert", "over TLS only", "hostssl"),
            ("host all all all cert", "over TLS only", "hostssl"),
            ("host all all all peer", "Unix sockets", "local"),
            (
                "host all all all scram-sha-256 clientcert=verify-ca",
                "over TLS only",
                "hostssl",
            ),
            (
                "hostssl all all all cert clientcert=verify-ca",
                "name as well",
                "verify-full",
            ),
            ("hostssl all all all cert map=x", "no map \"x\"", "MAP NAME USER"),
            (
                "hostssl all all all md5 map=staff",
                "only names of cert and peer",
                "Leave",
            ),
            (
                "hostssl all all all trust sloppy=1",
                "\"sloppy=1\" is unknown",
                "clientcert",
            ),
            ("hostnossl all all 10.0.0.0/8 password", "in clear", "hostssl"),
            ("hostnossl all all all password", "in clear", "hostssl"),
            ("host all \"eve all trust", "not closed", "Close"),
            ("host all ann, ", "ends with a comma", "Leave"),
            ("host all , all all trust", "comma stands alone", "a,b"),
            ("host all all all trust,md5", "is a list", "one method"),
        ] {
            let wrong =
                Rules::parse(&format!("# one\n{text}\nhost all all all trust\n"), &around(true, true)).unwrap_err();
            assert_eq!(wrong.len(), 1, "{text}: {wrong:?}");
            assert_eq!(wrong[0].line, 2, "{text}");
            assert!(wrong[0].what.contains(what), "{text}: {wrong:?}");
            assert!(wrong[0].fix.contains(fix), "{text}: {wrong:?}");
        }
        let of = |text, tls, ca| Rules::parse(text, &around(tls, ca)).unwrap_err().remove(0).what;
        assert!(of("hostssl all all all trust", false, false).contains("no [tls]"));
        assert!(of("hostssl all all all cert", true, false).contains("tls.client_ca"));
        assert!(of("# nothing\n", true, true).contains("nobody"));
    }

    #[test]
    fn names_are_mapped_to_users_and_without_a_map_they_are_users() {
        let lets = |text: &str, theirs: &str, user: &str| {
            let rules = parse(text);
            let rule = rules.find(&who("local", false, "app", user)).unwrap();
            rule.lets_be(theirs.as_bytes(), user.as_bytes())
        };
        for (text, theirs, user, may) in [
            ("local all all peer", "ann", "ann", true),
            ("local all all peer", "ann", "app", false),
            ("local all all peer map=staff", "ann", "app", true),
            ("local all all peer map=staff", "ann", "ann", false),
            ("local all all peer map=staff", "bob b", "all", true),
            ("local all all peer map=staff", "bob b", "app", false),
            ("local all all peer map=roots", "root", "app", true),
            ("local all all peer map=roots", "ann", "app", false),
        ] {
            assert_eq!(lets(text, theirs, user), may, "{text} {theirs} {user}");
        }
        for (text, what) in [
            ("staff ann", "not three"),
            ("staff /^(.*)$ \\1", "regular"),
            ("staff ann /app", "regular"),
            ("staff ann +admins", "member"),
            ("include other all", "included"),
            ("staff \"ann app", "not closed"),
        ] {
            let wrong = Maps::parse(&format!("ok a b\n{text}\n")).unwrap_err();
            assert!(
                wrong.len() == 1 && wrong[0].line == 2 && wrong[0].what.contains(what),
                "{wrong:?}"
            );
        }
        let without = Around::default();
        let wrong = Rules::parse("local all all peer map=staff", &without).unwrap_err();
        assert!(wrong[0].what.contains("auth.ident is not set"), "{wrong:?}");
    }

    #[test]
    fn who_is_trusted_from_elsewhere_is_known() {
        for (text, others) in [
            ("host all all 127.0.0.0/8 trust", false),
            ("host all all ::1/128 trust\nlocal all all trust", false),
            ("host all all 127.0.0.0/7 trust", true),
            ("host all all all trust", true),
            ("hostssl all all all trust clientcert=verify-full", false),
        ] {
            assert_eq!(parse(text).trust_others(), others, "{text}");
        }
        assert!(Rules::everybody(Method::Trust).trust_others());
    }

    proptest! {
        #[test]
        fn no_file_makes_the_reader_panic(text in "[ -~\n\t\"#,\\\\]{0,200}") {
            let _ = Rules::parse(&text, &around(true, true));
        }

        #[test]
        fn a_network_has_its_own_addresses_and_no_other(address in any::<u32>(), other in any::<u32>(), bits in 0u32..=32) {
            let network = Network::parse(&format!("{}/{bits}", std::net::Ipv4Addr::from_bits(address))).unwrap();
            let same = (0..bits).all(|n| (address ^ other) & (1 << (31 - n)) == 0);
            prop_assert_eq!(network.contains(std::net::Ipv4Addr::from_bits(other).into()), same);
        }
    }
}

//! SCRAM-SHA-256 (RFC 5802, RFC 7677; PostgreSQL manual, 55.3): the server's half towards clients, against a verifier, and
//! the client's half towards servers, with the ClientKey that a client's proof has given away and no password.
//!
//! Channel binding (`tls-server-end-point`, RFC 5929): whoever logs in proves that the certificate it sees is the one that
//! the server showed, so nobody stands in between. pgflip does: each of its two legs is bound to its own certificate.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256, Sha384, Sha512};
use spki::AlgorithmIdentifierRef;
use spki::der::asn1::AnyRef;
use spki::der::{Decode, Reader, SliceReader};
use subtle::ConstantTimeEq;

/// Without channel binding.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// With it: only over TLS.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// What a client that uses it begins with.
const BOUND: &str = "p=tls-server-end-point,";
/// Iterations of a mock verifier: Postgres's default, so that an unknown user looks like a known one.
const DEFAULT_ITERATIONS: u32 = 4096;

type Key = [u8; 32];

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn sha256(bytes: &[u8]) -> Key {
    Sha256::digest(bytes).into()
}

fn xor(mut a: Key, b: &Key) -> Key {
    a.iter_mut().zip(b).for_each(|(a, b)| *a ^= b);
    a
}

/// A SCRAM step that can't go on: what the peer did wrong. Never says anything about a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ScramError(pub &'static str);

/// What `pg_authid.rolpassword` holds.
#[derive(Clone)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

impl Verifier {
    /// Reads `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`. `None`: something else (md5).
    pub fn parse(text: &str) -> Option<Verifier> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (head, keys) = rest.split_once('$')?;
        let (iterations, salt) = head.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        let key = |text: &str| STANDARD.decode(text).ok()?.try_into().ok();
        Some(Verifier {
            iterations: iterations.parse().ok().filter(|n| *n > 0)?,
            salt: STANDARD.decode(salt).ok()?,
            stored_key: key(stored)?,
            server_key: key(server)?,
        })
    }

    /// What a password gives, if it is the one. Takes as long as the verifier's iterations, whether or not it is.
    pub fn check(&self, password: &[u8]) -> Option<Keys> {
        let keys = Keys::derive(password, &self.salt, self.iterations)?;
        let right = sha256(&keys.client_key).ct_eq(&self.stored_key) & keys.server_key.ct_eq(&self.server_key);
        bool::from(right).then_some(keys)
    }

    /// For a user without a usable verifier: the exchange goes on as for any other, with a salt that is always the same
    /// for this name, and fails at its end. `key` is the same in all sidecars.
    pub fn mock(user: &[u8], key: &[u8]) -> Verifier {
        let salt = hmac(key, &[b"salt", user]);
        Verifier {
            iterations: DEFAULT_ITERATIONS,
            salt: salt[..16].to_vec(),
            stored_key: rand::random(),
            server_key: rand::random(),
        }
    }
}

/// What a client's proof, or its password, gives: opens any server with the same verifier. Never shown.
#[derive(Clone)]
pub struct Keys {
    client_key: Key,
    server_key: Key,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

/// Most iterations that are computed here: ten million take seconds. Postgres's default is 4096.
pub const MAX_ITERATIONS: u32 = 10_000_000;

impl Keys {
    /// Those of a password. Takes as long as `iterations` say, milliseconds or more. `None`: these are too many.
    pub fn derive(password: &[u8], salt: &[u8], iterations: u32) -> Option<Keys> {
        if !(1..=MAX_ITERATIONS).contains(&iterations) {
            return None;
        }
        // What SASLprep forbids is taken as it came, as Postgres does.
        let prepared = std::str::from_utf8(password)
            .ok()
            .and_then(|p| stringprep::saslprep(p).ok());
        let password = prepared.as_ref().map_or(password, |prepared| prepared.as_bytes());
        let keyed = <Hmac<Sha256> as Mac>::new_from_slice(password).expect("HMAC takes keys of any length");
        let mut round: Key = keyed
            .clone()
            .chain_update(salt)
            .chain_update([0, 0, 0, 1])
            .finalize()
            .into_bytes()
            .into();
        let mut salted = round;
        for _ in 1..iterations {
            round = keyed.clone().chain_update(round).finalize().into_bytes().into();
            salted = xor(salted, &round);
        }
        Some(Keys {
            client_key: hmac(&salted, &[b"Client Key"]),
            server_key: hmac(&salted, &[b"Server Key"]),
        })
    }

    /// Whether they are the same.
    pub fn is(&self, other: &Keys) -> bool {
        (self.client_key.ct_eq(&other.client_key) & self.server_key.ct_eq(&other.server_key)).into()
    }

    /// What checks them, and the password that they are of.
    pub fn verifier(&self, salt: Vec<u8>, iterations: u32) -> Verifier {
        Verifier {
            iterations,
            salt,
            stored_key: sha256(&self.client_key),
            server_key: self.server_key,
        }
    }
}

/// A certificate's hash, as channel binding takes it. `None`: it is signed in a way for which that is not defined, such as
/// Ed25519, or it is no certificate.
pub fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let mut reader = SliceReader::new(certificate).ok()?;
    let signed = reader.sequence(|reader| -> spki::der::Result<_> {
        let _contents = AnyRef::decode(reader)?;
        let algorithm = AlgorithmIdentifierRef::decode(reader)?;
        let _signature = AnyRef::decode(reader)?;
        Ok(algorithm.oid)
    });
    let hash = match signed.ok()?.to_string().as_str() {
        // RSA with MD5, SHA-1 or SHA-256, ECDSA with SHA-1 or SHA-256: the first two are too weak, and SHA-256 stands in.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Sha256::digest(certificate).to_vec(),
        // RSA, ECDSA with SHA-384
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Sha384::digest(certificate).to_vec(),
        // RSA, ECDSA with SHA-512
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Sha512::digest(certificate).to_vec(),
        _ => return None,
    };
    Some(hash)
}

/// What a client has chosen.
#[derive(Clone, Copy)]
pub enum Binding<'a> {
    /// Nothing: the connection could not be bound.
    Impossible,
    /// Not to use it, though it was offered.
    Declined,
    /// It, with this [`end_point`].
    To(&'a [u8]),
}

/// The server's half, after its first message.
pub struct ServerExchange {
    verifier: Verifier,
    /// What the client's final message has to repeat.
    gs2_and_binding: Vec<u8>,
    client_first_bare: String,
    server_first: String,
    nonce: String,
}

impl ServerExchange {
    /// Takes the client's first message; the second value is the server's first.
    pub fn begin(
        verifier: Verifier,
        binding: Binding<'_>,
        client_first: &[u8],
    ) -> Result<(ServerExchange, String), ScramError> {
        let nonce: [u8; 18] = rand::random();
        ServerExchange::begin_with(verifier, binding, client_first, &STANDARD.encode(nonce))
    }

    fn begin_with(
        verifier: Verifier,
        binding: Binding<'_>,
        client_first: &[u8],
        nonce: &str,
    ) -> Result<(ServerExchange, String), ScramError> {
        let text = std::str::from_utf8(client_first).map_err(|_| ScramError("malformed SCRAM message"))?;
        let (rest, bound_to) = match (text.as_bytes().first(), binding) {
            (Some(b'p'), Binding::To(end_point)) => {
                let rest = text.strip_prefix(BOUND);
                (
                    rest.ok_or(ScramError("unsupported SCRAM channel-binding type"))?,
                    end_point,
                )
            }
            (Some(b'n' | b'y'), Binding::To(_)) => {
                return Err(ScramError(
                    "client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel binding data",
                ));
            }
            // Somebody between the two has taken the offer away.
            (Some(b'y'), Binding::Declined) => return Err(ScramError("SCRAM channel binding negotiation error")),
            (Some(b'n' | b'y'), _) => {
                let rest = text[1..].strip_prefix(',');
                (rest.ok_or(ScramError("malformed SCRAM message"))?, &[][..])
            }
            (Some(b'p'), _) => {
                return Err(ScramError(
                    "client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes channel binding data",
                ));
            }
            _ => return Err(ScramError("malformed SCRAM message")),
        };
        if rest.starts_with("a=") {
            return Err(ScramError(
                "client uses authorization identity, but it is not supported",
            ));
        }
        let bare = rest.strip_prefix(',').ok_or(ScramError("malformed SCRAM message"))?;
        if bare.starts_with("m=") {
            return Err(ScramError("client requires an unsupported SCRAM extension"));
        }
        // The user name in here is not used: the startup message's is (as in Postgres).
        let (user, attributes) = bare.split_once(',').ok_or(ScramError("malformed SCRAM message"))?;
        if !user.starts_with("n=") {
            return Err(ScramError("malformed SCRAM message"));
        }
        let client_nonce = attributes.split(',').next().and_then(|first| first.strip_prefix("r="));
        let client_nonce =
            client_nonce.filter(|nonce| !nonce.is_empty() && nonce.bytes().all(|b| (0x21..=0x7e).contains(&b)));
        let client_nonce = client_nonce.ok_or(ScramError("non-printable characters in SCRAM nonce"))?;
        let nonce = format!("{client_nonce}{nonce}");
        let server_first = format!(
            "r={nonce},s={},i={}",
            STANDARD.encode(&verifier.salt),
            verifier.iterations
        );
        let gs2 = &text.as_bytes()[..text.len() - bare.len()];
        let exchange = ServerExchange {
            verifier,
            gs2_and_binding: [gs2, bound_to].concat(),
            client_first_bare: bare.to_owned(),
            server_first: server_first.clone(),
            nonce,
        };
        Ok((exchange, server_first))
    }

    /// Takes the client's final message. `Ok(None)`: the proof is wrong. Else what it gives, and the server's final
    /// message.
    pub fn finish(&self, client_final: &[u8]) -> Result<Option<(Keys, String)>, ScramError> {
        let malformed = ScramError("malformed SCRAM message");
        let text = std::str::from_utf8(client_final).map_err(|_| malformed.clone())?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(malformed.clone())?;
        let mut attributes = without_proof.split(',');
        let binding = attributes
            .next()
            .and_then(|a| a.strip_prefix("c="))
            .ok_or(malformed.clone())?;
        if STANDARD.decode(binding).ok().as_deref() != Some(&self.gs2_and_binding) {
            return Err(ScramError("SCRAM channel binding check failed"));
        }
        let nonce = attributes
            .next()
            .and_then(|a| a.strip_prefix("r="))
            .ok_or(malformed.clone())?;
        if nonce != self.nonce {
            return Err(ScramError("invalid SCRAM response: nonce does not match"));
        }
        let proof: Key = STANDARD
            .decode(proof)
            .ok()
            .and_then(|p| p.try_into().ok())
            .ok_or(malformed)?;
        let auth = [
            self.client_first_bare.as_bytes(),
            b",",
            self.server_first.as_bytes(),
            b",",
            without_proof.as_bytes(),
        ];
        let client_key = xor(proof, &hmac(&self.verifier.stored_key, &auth));
        if !bool::from(sha256(&client_key).ct_eq(&self.verifier.stored_key)) {
            return Ok(None);
        }
        let signature = hmac(&self.verifier.server_key, &auth);
        let keys = Keys {
            client_key,
            server_key: self.verifier.server_key,
        };
        Ok(Some((keys, format!("v={}", STANDARD.encode(signature)))))
    }
}

/// The client's half.
pub struct ClientExchange {
    keys: Option<Keys>,
    gs2_and_binding: Vec<u8>,
    client_first_bare: String,
    nonce: String,
    expected: Option<Key>,
}

impl ClientExchange {
    /// The second value is the client's first message. `bound_to`: the server's [`end_point`], for [`MECHANISM_PLUS`]. Who has
    /// only a password has no keys before it knows the [`ClientExchange::salt`].
    pub fn begin(keys: Option<Keys>, bound_to: Option<&[u8]>) -> (ClientExchange, String) {
        let nonce = STANDARD.encode(rand::random::<[u8; 18]>());
        let bare = format!("n=,r={nonce}");
        let gs2 = match bound_to {
            Some(_) => format!("{BOUND},"),
            None => "n,,".to_owned(),
        };
        let first = format!("{gs2}{bare}");
        (
            ClientExchange {
                keys,
                gs2_and_binding: [gs2.as_bytes(), bound_to.unwrap_or_default()].concat(),
                client_first_bare: bare,
                nonce,
                expected: None,
            },
            first,
        )
    }

    /// Of the server's first message, what a password's keys are derived with: salt and iterations.
    pub fn salt(server_first: &[u8]) -> Option<(Vec<u8>, u32)> {
        let mut attributes = std::str::from_utf8(server_first).ok()?.split(',').skip(1);
        let salt = STANDARD.decode(attributes.next()?.strip_prefix("s=")?).ok()?;
        let iterations = attributes.next()?.strip_prefix("i=")?.parse().ok()?;
        Some((salt, iterations))
    }

    /// With these keys from now on.
    pub fn with(&mut self, keys: Keys) {
        self.keys = Some(keys);
    }

    /// Takes the server's first message and answers with the client's final one.
    pub fn respond(&mut self, server_first: &[u8]) -> Result<String, ScramError> {
        let malformed = ScramError("the server sent a malformed SCRAM message");
        if self.expected.is_some() {
            return Err(ScramError("the server began the SCRAM exchange twice"));
        }
        let server_first = std::str::from_utf8(server_first).map_err(|_| malformed.clone())?;
        let nonce = server_first
            .split(',')
            .next()
            .and_then(|a| a.strip_prefix("r="))
            .ok_or(malformed.clone())?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(malformed);
        }
        let keys = self.keys.as_ref().ok_or(ScramError("there are no keys"))?;
        let without_proof = format!("c={},r={nonce}", STANDARD.encode(&self.gs2_and_binding));
        let auth = [
            self.client_first_bare.as_bytes(),
            b",",
            server_first.as_bytes(),
            b",",
            without_proof.as_bytes(),
        ];
        let proof = xor(keys.client_key, &hmac(&sha256(&keys.client_key), &auth));
        self.expected = Some(hmac(&keys.server_key, &auth));
        Ok(format!("{without_proof},p={}", STANDARD.encode(proof)))
    }

    /// Checks the server's signature: it knows the verifier.
    pub fn finish(&self, server_final: &[u8]) -> Result<(), ScramError> {
        let signature = server_final
            .strip_prefix(b"v=")
            .and_then(|text| STANDARD.decode(text).ok());
        match (signature, self.expected) {
            (Some(signature), Some(expected)) if bool::from(signature.ct_eq(&expected)) => Ok(()),
            _ => Err(ScramError(
                "the server's SCRAM signature is wrong: it does not hold this role's verifier",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: &[u8] = b"0123456789abcdef";

    fn verifier(password: &[u8]) -> Verifier {
        client_key(password).verifier(SALT.to_vec(), 4096)
    }

    fn client_key(password: &[u8]) -> Keys {
        Keys::derive(password, SALT, 4096).unwrap()
    }

    #[test]
    fn the_key_in_a_right_proof_opens_the_next_server() {
        let (mut client, first) = ClientExchange::begin(Some(client_key(b"sesame")), None);
        let (server, server_first) =
            ServerExchange::begin(verifier(b"sesame"), Binding::Impossible, first.as_bytes()).unwrap();
        let last = client.respond(server_first.as_bytes()).unwrap();
        let (keys, server_final) = server.finish(last.as_bytes()).unwrap().expect("the proof is right");
        client.finish(server_final.as_bytes()).unwrap();

        let (mut onward, first) = ClientExchange::begin(Some(keys), None);
        let (server, server_first) =
            ServerExchange::begin(verifier(b"sesame"), Binding::Impossible, first.as_bytes()).unwrap();
        let last = onward.respond(server_first.as_bytes()).unwrap();
        let (_, server_final) = server.finish(last.as_bytes()).unwrap().expect("the key opens");
        onward.finish(server_final.as_bytes()).unwrap();
    }

    #[test]
    fn a_wrong_proof_a_foreign_nonce_and_channel_binding_that_was_not_offered_are_refused() {
        let (mut client, first) = ClientExchange::begin(Some(client_key(b"sesam")), None);
        let (server, server_first) =
            ServerExchange::begin(verifier(b"sesame"), Binding::Impossible, first.as_bytes()).unwrap();
        let last = client.respond(server_first.as_bytes()).unwrap();
        assert!(server.finish(last.as_bytes()).unwrap().is_none());
        assert!(server.finish(last.replace("r=", "r=x").as_bytes()).is_err());
        assert!(server.finish(last.replace("biws", "eSws").as_bytes()).is_err());
        assert!(
            ServerExchange::begin(verifier(b"x"), Binding::Impossible, b"p=tls-server-end-point,,n=,r=abc").is_err()
        );
        assert!(client.respond(b"r=evil,s=AAAA,i=1").is_err());
        assert!(client.finish(b"v=AAAA").is_err());
    }

    #[test]
    fn a_login_is_bound_to_the_certificate_that_the_client_has_seen() {
        let login = |seen: &[u8], shown: &[u8]| {
            let (mut client, first) = ClientExchange::begin(Some(client_key(b"sesame")), Some(seen));
            let (server, server_first) =
                ServerExchange::begin(verifier(b"sesame"), Binding::To(shown), first.as_bytes()).unwrap();
            let last = client.respond(server_first.as_bytes()).unwrap();
            server.finish(last.as_bytes()).map(|keys| keys.is_some())
        };
        assert_eq!(login(b"hash", b"hash"), Ok(true));
        assert_eq!(
            login(b"hash", b"other"),
            Err(ScramError("SCRAM channel binding check failed"))
        );
        let begin = |binding, first: &str| ServerExchange::begin(verifier(b"x"), binding, first.as_bytes()).is_ok();
        let (bound, could, can_not) = (format!("{BOUND},n=,r=abc"), "y,,n=,r=abc", "n,,n=,r=abc");
        assert!(begin(Binding::To(b"hash"), &bound) && !begin(Binding::To(b"hash"), could));
        assert!(!begin(Binding::To(b"hash"), "p=tls-unique,,n=,r=abc"));
        // Who could but was told that it can't has somebody in between.
        assert!(
            begin(Binding::Declined, can_not) && !begin(Binding::Declined, could) && !begin(Binding::Declined, &bound)
        );
        assert!(begin(Binding::Impossible, can_not) && begin(Binding::Impossible, could));
    }

    #[test]
    fn a_certificates_hash_is_the_one_that_it_is_signed_with() {
        let lengths = [
            (&rcgen::PKCS_ECDSA_P256_SHA256, Some(32)),
            (&rcgen::PKCS_ECDSA_P384_SHA384, Some(48)),
            (&rcgen::PKCS_ED25519, None),
        ];
        for (algorithm, length) in lengths {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
            assert_eq!(end_point(certificate.der()).map(|hash| hash.len()), length);
        }
        assert_eq!(end_point(b"nothing"), None);
    }

    #[test]
    fn a_mock_verifier_has_a_stable_salt_and_no_proof_fits_it() {
        let (a, b) = (Verifier::mock(b"eve", b"key"), Verifier::mock(b"eve", b"key"));
        assert_eq!(a.salt, b.salt);
        assert_ne!(a.salt, Verifier::mock(b"bob", b"key").salt);
        let (mut client, first) = ClientExchange::begin(Some(client_key(b"sesame")), None);
        let (server, server_first) = ServerExchange::begin(a, Binding::Impossible, first.as_bytes()).unwrap();
        let last = client.respond(server_first.as_bytes()).unwrap();
        assert!(server.finish(last.as_bytes()).unwrap().is_none());
    }

    #[test]
    fn the_verifier_of_rfc_7677_reads_back() {
        let text = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        let verifier = Verifier::parse(text).unwrap();
        assert_eq!(verifier.iterations, 4096);
        let first = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
        let (server, server_first) =
            ServerExchange::begin_with(verifier, Binding::Impossible, first, "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0").unwrap();
        assert_eq!(
            server_first,
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let last = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        let (_, server_final) = server.finish(last).unwrap().expect("RFC 7677's proof");
        assert_eq!(server_final, "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
        // Its password, in clear.
        let verifier = Verifier::parse(text).unwrap();
        assert!(verifier.check(b"pencil").is_some() && verifier.check(b"pencil ").is_none());
        assert!(Verifier::mock(b"eve", b"key").check(b"pencil").is_none());
        assert!(Verifier::parse("md5abc").is_none());
    }

    #[test]
    fn a_password_is_prepared_as_postgres_does_and_a_claim_of_endless_work_is_refused() {
        let same = |a: &[u8], b: &[u8]| verifier(a).check(b).is_some();
        // RFC 4013, 3: soft hyphens vanish, a Roman numeral is two letters, a no-break space is a space.
        assert!(same("I\u{ad}X".as_bytes(), b"IX") && same("\u{2168}".as_bytes(), b"IX"));
        assert!(same("a\u{a0}b".as_bytes(), b"a b"));
        // Forbidden, or no UTF-8: as they came.
        assert!(same(b"a\x07", b"a\x07") && !same(b"a\x07", b"a"));
        assert!(same(b"\xff\xfe", b"\xff\xfe") && !same(b"\xff\xfe", b"\xff"));
        assert!(Keys::derive(b"x", SALT, 0).is_none() && Keys::derive(b"x", SALT, u32::MAX).is_none());
        assert_eq!(
            ClientExchange::salt(b"r=abc,s=MDEy,i=4096"),
            Some((b"012".to_vec(), 4096))
        );
        assert_eq!(ClientExchange::salt(b"r=abc,s=MDEy,i=-1"), None);
    }
}

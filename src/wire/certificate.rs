//! Whose a certificate is. That it may be trusted is TLS's to say.

use spki::der::asn1::AnyRef;
use spki::der::{Decode, Reader, SliceReader, Tag, Tagged};

/// 2.5.4.3, id-at-commonName, as it is encoded.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The subject's common name. `None`: none, or several (whose would it be?), or it is no text of bytes that a user's name
/// could be.
pub fn common_name(certificate: &[u8]) -> Option<Vec<u8>> {
    // Certificate → TBSCertificate → … the second sequence behind `signature` and `issuer` (RFC 5280, 4.1).
    let signed = inside(certificate)?.into_iter().next()?;
    let mut fields = inside_of(signed)?
        .into_iter()
        .skip_while(|field| field.tag() != Tag::Integer);
    let subject = fields.nth(4)?;
    let mut names = Vec::new();
    for set in inside_of(subject)? {
        for pair in inside_of(set)? {
            let pair = inside_of(pair)?;
            let [name, value] = pair.as_slice() else { return None };
            if name.tag() == Tag::ObjectIdentifier && name.value() == COMMON_NAME {
                names.push(*value);
            }
        }
    }
    let [name] = names.as_slice() else { return None };
    let text = matches!(name.tag(), Tag::Utf8String | Tag::PrintableString | Tag::Ia5String);
    (text && !name.value().is_empty() && !name.value().contains(&0)).then(|| name.value().to_vec())
}

/// The elements of the one that these bytes are.
fn inside(bytes: &[u8]) -> Option<Vec<AnyRef<'_>>> {
    inside_of(AnyRef::from_der(bytes).ok()?)
}

fn inside_of(element: AnyRef<'_>) -> Option<Vec<AnyRef<'_>>> {
    let mut reader = SliceReader::new(element.value()).ok()?;
    let mut elements = Vec::new();
    while !reader.is_finished() {
        elements.push(AnyRef::decode(&mut reader).ok()?);
    }
    Some(elements)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair};

    fn of(parts: &[(DnType, DnValue)]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind.clone(), value.clone());
        }
        params
            .self_signed(&KeyPair::generate().unwrap())
            .unwrap()
            .der()
            .to_vec()
    }

    fn text(text: &str) -> DnValue {
        DnValue::Utf8String(text.into())
    }

    #[test]
    fn the_common_name_is_found_among_the_others() {
        let whole = of(&[
            (DnType::OrganizationName, text("admin")),
            (DnType::CommonName, text("jörg")),
            (DnType::OrganizationalUnitName, text("root")),
        ]);
        assert_eq!(common_name(&whole).as_deref(), Some("jörg".as_bytes()));
        assert_eq!(common_name(&of(&[(DnType::OrganizationName, text("admin"))])), None);
        assert_eq!(common_name(&of(&[])), None);
        // A name that ends early for somebody who reads it as C does.
        assert_eq!(common_name(&of(&[(DnType::CommonName, text("postgres\0.evil"))])), None);
        assert_eq!(common_name(&of(&[(DnType::CommonName, text(""))])), None);
        assert_eq!(common_name(&whole[..whole.len() - 1]), None);
    }

    static WHOLE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| of(&[(DnType::CommonName, text("app"))]));

    proptest! {
        #[test]
        fn no_certificate_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), at in 0usize..400, to in any::<u8>()) {
            let _ = common_name(&bytes);
            let mut whole = WHOLE.clone();
            if let Some(byte) = whole.get_mut(at) {
                *byte = to;
            }
            let _ = common_name(&whole);
        }
    }
}

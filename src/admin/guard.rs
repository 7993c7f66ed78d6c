//! Who may use the admin port.
//!
//! With a token: whoever sends it. Without one the port listens on loopback, but the browser of somebody on this
//! machine reaches loopback too, on behalf of any web page: a page can post a form here, or resolve its own name to
//! 127.0.0.1 (DNS rebinding) and then read answers as well. So without a token, requests that carry an `Origin`, or
//! whose `Host` is not a loopback address or `localhost`, are refused. Bodies are JSON by their Content-Type in any
//! case, which no form can send.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{Admin, Refusal};
use crate::config::Secret;

/// Lets a request through, or refuses it.
pub async fn check(State(admin): State<Arc<Admin>>, request: Request, next: Next) -> Response {
    let token = admin.config.load().admin.token.clone();
    match allowed(token.as_ref(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

fn allowed(token: Option<&Secret>, headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(token) = token else {
        return not_a_browser(headers);
    };
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (first, second) = (given.next(), given.next());
    let sent = first
        .filter(|_| second.is_none())
        .map(|value| value.as_bytes())
        .and_then(|value| {
            let (scheme, rest) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(rest)
        });
    // Digests have one length: neither the token's length nor how much of it is right can be timed.
    let right: bool = Sha256::digest(sent.unwrap_or_default())
        .ct_eq(&Sha256::digest(token.expose()))
        .into();
    match (right && sent.is_some(), first.is_some()) {
        (true, _) => Ok(()),
        (false, sent) => Err(Refusal::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            if sent {
                "The token is wrong."
            } else {
                "A token is needed."
            },
            "Send the header \"Authorization: Bearer …\" with the value of admin.token (pgflip's commands: --token, PGFLIP_TOKEN, or --config).",
        )),
    }
}

fn not_a_browser(headers: &HeaderMap) -> Result<(), Refusal> {
    let forbidden = |what: &str, next: &str| Err(Refusal::new(StatusCode::FORBIDDEN, "forbidden", what, next));
    if headers.contains_key(header::ORIGIN) {
        return forbidden(
            "The request comes from a web page (it has an Origin).",
            "Set admin.token to use the port from a browser.",
        );
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().unwrap_or(""),
        _ => "",
    };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(""),
    };
    if name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
        return Ok(());
    }
    forbidden(
        "The request's Host is not this machine's own name for itself.",
        "Without a token, ask for localhost, 127.0.0.1 or [::1]; or set admin.token.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn only_the_exact_token_opens() {
        let token = Secret::new("0123456789abcdef");
        for good in ["Bearer 0123456789abcdef", "bearer 0123456789abcdef"] {
            assert!(
                allowed(Some(&token), &headers(&[("authorization", good)])).is_ok(),
                "{good}"
            );
        }
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdefg",
            "Bearer  0123456789abcdef",
            "Basic 0123456789abcdef",
            "0123456789abcdef",
        ] {
            let refusal = allowed(Some(&token), &headers(&[("authorization", bad)])).unwrap_err();
            assert_eq!(refusal.status, StatusCode::UNAUTHORIZED, "{bad}");
        }
        assert!(allowed(Some(&token), &headers(&[])).is_err());
        let twice = headers(&[
            ("authorization", "Bearer 0123456789abcdef"),
            ("authorization", "Bearer x"),
        ]);
        assert!(allowed(Some(&token), &twice).is_err());
    }

    #[test]
    fn without_a_token_web_pages_are_kept_out() {
        for good in [
            "localhost:6433",
            "127.0.0.1:6433",
            "[::1]:6433",
            "127.1.2.3",
            "LOCALHOST",
        ] {
            assert!(allowed(None, &headers(&[("host", good)])).is_ok(), "{good}");
        }
        for bad in [
            "evil.example",
            "evil.example:6433",
            "10.0.0.1",
            "localhost.evil.example",
            "",
            "127.0.0.1.evil.example",
        ] {
            assert!(allowed(None, &headers(&[("host", bad)])).is_err(), "{bad}");
        }
        assert!(allowed(None, &headers(&[])).is_err());
        assert!(
            allowed(
                None,
                &headers(&[("host", "localhost"), ("origin", "http://evil.example")])
            )
            .is_err()
        );
        assert!(allowed(None, &headers(&[("host", "localhost"), ("origin", "null")])).is_err());
        assert!(allowed(None, &headers(&[("host", "localhost"), ("host", "evil.example")])).is_err());
    }
}

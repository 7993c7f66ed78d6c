//! What a request is told that can't be served: a status, and what happened, what it means and what to do next.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// `{"error": {code, what, means, next}}`.
#[derive(Clone, Debug, Serialize)]
pub struct Refusal {
    /// HTTP status.
    #[serde(skip)]
    pub status: StatusCode,
    /// For programs: `unauthorized`, `bad_request`, `busy` …
    pub code: String,
    /// What happened.
    pub what: String,
    /// What it means for the data.
    pub means: String,
    /// What to do next.
    pub next: String,
}

impl Refusal {
    /// A refusal before anything was done.
    pub fn new(status: StatusCode, code: &str, what: impl Into<String>, next: impl Into<String>) -> Refusal {
        Refusal {
            status,
            code: code.into(),
            what: what.into(),
            means: "Nothing was done.".into(),
            next: next.into(),
        }
    }

    /// 400.
    pub fn bad_request(what: impl Into<String>, next: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_request", what, next)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(serde_json::json!({ "error": self }))).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"pgflip\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

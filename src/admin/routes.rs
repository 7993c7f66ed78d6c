//! The route table, and what each route reads and answers.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Admin, Refusal, events, guard};
use crate::config::{Guarantee, Stragglers};
use crate::controller::operation::Operation;
use crate::controller::{Compared, Direction, FlipRequest, Force, Refused, Request as Order, resync, verify};
use crate::pg::Side;
use crate::telemetry;

/// Bodies are a handful of flags.
const BODY_MAX: usize = 16 * 1024;
/// A request that reads from the servers may take this long; they have deadlines of their own below it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

type Answer = Result<Response, Refusal>;
type Shared = State<Arc<Admin>>;

/// All routes. Everything under /v1 and /metrics is guarded; the probes tell nothing but yes or no.
pub fn router(admin: Arc<Admin>) -> Router {
    let v1 = Router::new()
        .route("/status", get(status))
        .route("/lag", get(lag))
        .route("/sessions", get(sessions))
        .route("/check", get(check))
        .route("/replication", get(replication))
        .route("/replication/start", post(replication_start))
        .route("/replication/stop", post(replication_stop))
        .route("/cutover", post(cutover))
        .route("/rollback", post(rollback))
        .route("/finalize", post(finalize))
        .route("/abort", post(abort))
        .route("/verify", post(verify_all))
        .route("/verify/stop", post(verify_stop))
        .route("/verify/pause", post(verify_pause))
        .route("/resync", post(resync_table))
        .route("/row", get(row))
        .route("/operations", get(operations))
        .route("/operations/{id}", get(operation));
    let v1 = v1
        .layer(middleware::from_fn(timed))
        .route("/operations/{id}/events", get(operation_events));
    Router::new()
        .nest("/v1", v1)
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(admin.clone(), guard::check))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn(headers))
        .with_state(admin)
}

/// No answer is kept by anything in between, or taken for something else by a browser.
async fn headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn timed(request: Request, next: Next) -> Response {
    match tokio::time::timeout(ANSWER_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Refusal {
            means: "What was asked may still be going on.".into(),
            ..Refusal::new(
                StatusCode::GATEWAY_TIMEOUT,
                "timeout",
                format!("There was no answer within {ANSWER_TIMEOUT:?}."),
                "Look at `pgflip status`, then try again.",
            )
        }
        .into_response(),
    }
}

async fn no_such_path(request: Request) -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "not_found",
        format!("There is no {}.", request.uri().path()),
        "The README lists the paths; they begin with /v1.",
    )
}

async fn wrong_method(request: Request) -> Refusal {
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{} is not served at {}.", request.method(), request.uri().path()),
        "Reading is GET, acting is POST.",
    )
}

async fn status(State(admin): Shared) -> Response {
    Json(admin.controller.status().await).into_response()
}

async fn lag(State(admin): Shared) -> Response {
    Json(json!({ "lag": admin.controller.lag().await })).into_response()
}

async fn sessions(State(admin): Shared) -> Response {
    let (sessions, unread) = admin.controller.sessions().await;
    Json(json!({ "sessions": sessions, "unread": unread })).into_response()
}

async fn check(State(admin): Shared) -> Response {
    Json(json!({ "findings": admin.controller.check().await })).into_response()
}

async fn replication(State(admin): Shared) -> Response {
    Json(admin.controller.replication_status().await).into_response()
}

async fn replication_start(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    read(&headers, body, &[])?;
    begin(&admin, Order::ReplicationStart)
}

async fn replication_stop(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    read(&headers, body, &[])?;
    begin(&admin, Order::ReplicationStop)
}

async fn finalize(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    read(&headers, body, &[])?;
    begin(&admin, Order::Finalize)
}

async fn abort(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    read(&headers, body, &[])?;
    let operation = admin
        .controller
        .abort()
        .map_err(|refused| Refusal::new(StatusCode::CONFLICT, refused.code, refused.what, refused.next))?;
    Ok((StatusCode::ACCEPTED, Json(operation.view())).into_response())
}

/// Options of a verification.
const VERIFY: &[(&str, &str)] = &[
    ("tables", "a list of names, such as [\"public.orders\"]"),
    (
        "where",
        "comparisons of the table's columns with values, such as \"id > 5000\"",
    ),
    ("show_values", "true or false"),
    ("max_load", "a number"),
    ("follow", "true or false"),
    ("listed", "a number: how many differences of a table are listed"),
    (
        "kinds",
        "a list of \"missing\", \"extra\", \"different\": which of them",
    ),
    ("resume", "true or false: go on with the one that was broken off"),
];

async fn verify_all(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    let options = read(&headers, body, VERIFY)?;
    if options.one("resume")?.unwrap_or(false) {
        if options.given.values().filter(|value| !value.is_null()).count() > 1 {
            return Err(Refusal::bad_request(
                "\"resume\" goes on with a verification as it was begun, and was given with other options.",
                "Leave the others out, or begin a verification without \"resume\".",
            ));
        }
        return begun(&admin, admin.controller.verify_on().await);
    }
    let request = verify::Request {
        tables: options.one("tables")?.unwrap_or_default(),
        only: options.one("where")?,
        show_values: options.one("show_values")?.unwrap_or(false),
        max_load: options.one("max_load")?,
        listed: options
            .one("listed")?
            .map_or(verify::LISTED, |listed: usize| listed.min(verify::LISTED_MAX)),
        kinds: options.one("kinds")?.unwrap_or_default(),
    };
    let follow = options.one("follow")?.unwrap_or(false);
    if follow && (!request.tables.is_empty() || request.only.is_some()) {
        return Err(Refusal::bad_request(
            "Only all of it can be followed.",
            "Leave follow out, or tables and where.",
        ));
    }
    begun(&admin, admin.controller.verify(request, follow))
}

async fn verify_stop(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    read(&headers, body, &[])?;
    let stood = admin.controller.verify_stop().await;
    Ok(Json(json!({ "verification": stood })).into_response())
}

async fn verify_pause(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    read(&headers, body, &[])?;
    begun(&admin, admin.controller.verify_pause())
}

async fn row(State(admin): Shared, Query(asked): Query<Vec<(String, String)>>) -> Answer {
    let mut wanted = verify::row::Wanted {
        table: String::new(),
        key: Vec::new(),
        database: None,
    };
    for (name, value) in asked {
        match name.as_str() {
            "table" => wanted.table = value,
            "key" => wanted.key.push(value),
            "database" => wanted.database = Some(value),
            name => {
                return Err(Refusal::bad_request(
                    format!("There is no parameter {name:?}."),
                    "The parameters are: table, key (one for each column of the key), database.",
                ));
            }
        }
    }
    let row = admin.controller.row(wanted).await.map_err(|refused| {
        let status = match refused.code {
            "bad_request" => StatusCode::BAD_REQUEST,
            "no_table" | "no_row" => StatusCode::NOT_FOUND,
            "no_key" => StatusCode::CONFLICT,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Refusal::new(status, refused.code, refused.what, refused.next)
    })?;
    Ok(Json(row).into_response())
}

/// Options of a resync.
const RESYNC: &[(&str, &str)] = &[
    ("table", "the name of a table, such as \"public.orders\""),
    ("database", "a name"),
    ("rows", "true or false"),
    ("dry_run", "true or false"),
];

async fn resync_table(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    let options = read(&headers, body, RESYNC)?;
    let Some(table) = options.one("table")? else {
        return Err(Refusal::bad_request(
            "No table is named.",
            "Send {\"table\": \"public.orders\"}.",
        ));
    };
    let request = resync::Request {
        table,
        database: options.one("database")?,
        rows: options.one("rows")?.unwrap_or(false),
        dry_run: options.one("dry_run")?.unwrap_or(false),
    };
    begin(&admin, Order::Resync(request))
}

/// Options of a flip, each with what it must be. `force` is the name of the side whose data may be lost: the one that
/// is active now. Typing it out is the consent.
const FLIP: &[(&str, &str)] = &[
    ("rehearse", "true or false"),
    ("stragglers", "\"unwind\" or \"terminate\""),
    ("guarantee", "\"none\", \"counts\" or \"verified\""),
    ("accept_type_oids", "true or false"),
    ("force", "\"blue\" or \"green\", the side that is given up"),
];

async fn cutover(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    flip(&admin, Direction::Cutover, &headers, body)
}

async fn rollback(State(admin): Shared, headers: HeaderMap, body: Body) -> Answer {
    flip(&admin, Direction::Rollback, &headers, body)
}

fn flip(admin: &Admin, direction: Direction, headers: &HeaderMap, body: Body) -> Answer {
    let options = read(headers, body, FLIP)?;
    let rehearse = options.one::<bool>("rehearse")?.unwrap_or(false);
    let stragglers = options.one::<Stragglers>("stragglers")?;
    let guarantee = options.one::<Guarantee>("guarantee")?;
    let accept_type_oids = options.one::<bool>("accept_type_oids")?.unwrap_or(false);
    let source = direction.source();
    let force = match options.one::<Side>("force")? {
        None => None,
        Some(side) if side == source => Some(Force),
        Some(side) => {
            return Err(Refusal::bad_request(
                format!("force names {side}, but this flip leaves {source}."),
                format!(
                    "Force gives up what {source} has and its replica has not: write \"force\": \"{source}\" only if that may be lost."
                ),
            ));
        }
    };
    if rehearse && force.is_some() {
        return Err(Refusal::bad_request(
            "A rehearsal can't be forced.",
            "Leave one of rehearse and force out.",
        ));
    }
    if force.is_some() && guarantee.is_some_and(|guarantee| guarantee != Guarantee::None) {
        return Err(Refusal::bad_request(
            "A flip that is forced can prove nothing: the other side can't be asked.",
            "Leave one of guarantee and force out.",
        ));
    }
    let request = FlipRequest {
        direction,
        rehearse,
        force,
        stragglers,
        guarantee,
        accept_type_oids,
    };
    begin(admin, Order::Flip(request))
}

fn begin(admin: &Admin, order: Order) -> Answer {
    begun(admin, admin.controller.begin(order))
}

fn begun(admin: &Admin, begun: Result<Operation, Refused>) -> Answer {
    let operation = begun.map_err(|refused| {
        let status = match refused.code {
            "not_ready" => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::CONFLICT,
        };
        Refusal::new(status, refused.code, refused.what, refused.next)
    })?;
    admin.remember(&operation);
    let location = format!("/v1/operations/{}", operation.id());
    let location = HeaderValue::from_str(&location).expect("a path of digits and letters");
    Ok((
        StatusCode::ACCEPTED,
        [(header::LOCATION, location)],
        Json(operation.view()),
    )
        .into_response())
}

type Body = Result<Bytes, axum::extract::rejection::BytesRejection>;

/// A JSON object, or no body at all for "no options".
fn read(headers: &HeaderMap, body: Body, known: &'static [(&'static str, &'static str)]) -> Result<Options, Refusal> {
    let body = body.map_err(|rejection| {
        let (code, next) = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ("too_large", "Send the options and nothing else."),
            _ => ("bad_request", "Send the request again."),
        };
        Refusal::new(rejection.status(), code, rejection.body_text(), next)
    })?;
    let kind = headers
        .get(header::CONTENT_TYPE)
        .map(|value| value.to_str().unwrap_or(""));
    let json = kind.is_some_and(|kind| {
        kind.split(';')
            .next()
            .unwrap_or("")
            .trim()
            .eq_ignore_ascii_case("application/json")
    });
    if kind.is_some() && !json || kind.is_none() && !body.is_empty() {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "The body is not declared as JSON.",
            "Send Content-Type: application/json.",
        ));
    }
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    let given: Value = serde_json::from_slice(body)
        .map_err(|error| Refusal::bad_request(format!("The body is not JSON: {error}."), "Send a JSON object."))?;
    let Value::Object(given) = given else {
        return Err(Refusal::bad_request(
            "The body is not a JSON object.",
            "Send {\"option\": value}, or nothing.",
        ));
    };
    let unknown: Vec<String> = given
        .keys()
        .filter(|name| !known.iter().any(|(known, _)| known == name))
        .map(|name| format!("{name:?}"))
        .collect();
    if unknown.is_empty() {
        return Ok(Options { given, known });
    }
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    let next = match names.as_slice() {
        [] => "This request takes no options.".to_owned(),
        names => format!("The options are: {}.", names.join(", ")),
    };
    Err(Refusal::bad_request(
        format!("There is no option {}.", unknown.join(", ")),
        next,
    ))
}

/// A request's options, all of them known.
struct Options {
    given: serde_json::Map<String, Value>,
    known: &'static [(&'static str, &'static str)],
}

impl Options {
    /// One option; `null` is the same as leaving it out.
    fn one<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Refusal> {
        let value = match self.given.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        T::deserialize(value).map(Some).map_err(|_| {
            let expected = self
                .known
                .iter()
                .find(|(known, _)| *known == name)
                .map_or("", |(_, expected)| expected);
            Refusal::bad_request(format!("{name:?} can't be {value}."), format!("Write {expected}."))
        })
    }
}

async fn operations(State(admin): Shared) -> Response {
    let views: Vec<_> = admin.operations().iter().map(|operation| operation.view()).collect();
    Json(json!({ "operations": views })).into_response()
}

fn find(admin: &Admin, id: &str) -> Result<crate::controller::operation::Operation, Refusal> {
    let id: u64 = id.parse().map_err(|_| {
        Refusal::bad_request(
            format!("{id:?} is not an operation's id."),
            "Ids are numbers. `pgflip watch` without one follows the newest.",
        )
    })?;
    admin.operation(id).ok_or_else(|| {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("There is no operation {id} in this process."),
            "`pgflip watch` follows the newest. After a restart, `pgflip status` tells what became of a flip.",
        )
    })
}

async fn operation(State(admin): Shared, Path(id): Path<String>) -> Answer {
    Ok(Json(find(&admin, &id)?.view()).into_response())
}

async fn operation_events(State(admin): Shared, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    let operation = find(&admin, &id)?;
    let from = match headers.get("last-event-id").map(|value| value.to_str().unwrap_or("")) {
        None | Some("") => 0,
        Some(text) => text
            .parse::<u64>()
            .ok()
            .and_then(|last| last.checked_add(1))
            .ok_or_else(|| {
                Refusal::bad_request(
                    "Last-Event-ID is not a number.",
                    "Send the id of the last event you have, or leave it out.",
                )
            })?,
    };
    Ok(events::stream(operation, from, admin.closing()).into_response())
}

async fn ready(State(admin): Shared) -> Response {
    if *admin.closing().borrow() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n").into_response();
    }
    match admin.controller.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics(State(admin): Shared) -> Response {
    let mut text = admin
        .metrics
        .as_ref()
        .map(|recorded| recorded.render())
        .unwrap_or_default();
    live_gauges(&admin, &mut text).await;
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}

/// What is read at the moment of the scrape: the sessions' own counts, added up, and gauges. Written here rather than
/// recorded, because a recorded gauge can't be absent: an unknown lag would show its last value.
async fn live_gauges(admin: &Admin, text: &mut String) {
    let mut put = |name: &str, samples: &[(String, f64)]| {
        let Some((_, kind, meaning)) = telemetry::METRICS.iter().find(|(known, ..)| *known == name) else {
            return;
        };
        if samples.is_empty() {
            return;
        }
        let _ = write!(text, "# HELP {name} {meaning}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let plain = |value: f64| [(String::new(), value)];
    let totals = admin.gate.totals();
    put(telemetry::SESSIONS, &plain(totals.sessions as f64));
    put(telemetry::QUERIES, &plain(totals.queries as f64));
    put(telemetry::LOG_LINES_LOST, &plain(telemetry::log_lines_lost() as f64));
    let direction = |name: &str, bytes: u64| (format!("{{direction=\"{name}\"}}"), bytes as f64);
    put(
        telemetry::BYTES,
        &[direction("in", totals.bytes_in), direction("out", totals.bytes_out)],
    );
    // A side that does not answer is waited for once.
    let (compared, lag) = tokio::join!(admin.controller.compared(), admin.controller.lag());
    let upstream = admin.gate.upstream();
    put(telemetry::HELD, &plain(f64::from(u8::from(admin.gate.held()))));
    put(telemetry::EPOCH, &plain(upstream.map_or(0.0, |at| at.epoch as f64)));
    let active = |side: Side| f64::from(u8::from(upstream.is_some_and(|at| at.side == side)));
    put(
        telemetry::ACTIVE,
        &Side::BOTH.map(|side| (format!("{{side=\"{side}\"}}"), active(side))),
    );
    let Compared {
        running,
        last,
        followed,
    } = compared;
    let yes = |yes: bool| plain(f64::from(u8::from(yes)));
    put(telemetry::VERIFYING, &yes(running));
    if let Some(result) = last {
        put(telemetry::VERIFIED_EQUAL, &yes(result["outcome"] == "equal"));
        for (name, key) in [
            (telemetry::VERIFIED_AT, "at"),
            (telemetry::VERIFIED_BEGAN, "began"),
            (telemetry::VERIFIED_TABLES, "tables"),
            (telemetry::VERIFIED_ROWS, "rows"),
            (telemetry::VERIFIED_DIFFERENCES, "differences"),
            (telemetry::VERIFIED_UNSETTLED, "unsettled"),
        ] {
            put(name, &plain(result[key].as_f64().unwrap_or(f64::NAN)));
        }
    }
    put(telemetry::FOLLOWING, &yes(followed["state"] == "following"));
    for (name, key) in [
        (telemetry::FOLLOW_PENDING, "pending"),
        (telemetry::FOLLOW_PENDING_TABLES, "pending_tables"),
        (telemetry::FOLLOW_DIFFERENCES, "differences"),
        (telemetry::FOLLOW_BEHIND, "behind"),
    ] {
        if let Some(value) = followed[key].as_f64() {
            put(name, &plain(value));
        }
    }
    let labels = |lag: &Value| {
        let text = |key: &str| {
            lag[key]
                .as_str()
                .unwrap_or("")
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n")
        };
        format!("{{database=\"{}\",to=\"{}\"}}", text("database"), text("to"))
    };
    let lag: Vec<Value> = lag.iter().filter_map(|lag| serde_json::to_value(lag).ok()).collect();
    for (name, key) in [(telemetry::LAG_BYTES, "bytes"), (telemetry::LAG_SECONDS, "seconds")] {
        let samples: Vec<_> = lag
            .iter()
            .filter_map(|lag| Some((labels(lag), lag[key].as_f64()?)))
            .collect();
        put(name, &samples);
    }
}

//! Which address does what, and what stands before all of them: an id, a line in the log, the key.
//!
//! Decision: pages of other origins are not answered unless allowed by option, because a server on
//! loopback without a key would otherwise answer every page that its user visits. Such a server also goes by
//! no name that it was not given: a page may have its own name lead here (DNS rebinding), and is then of the same
//! origin as far as its browser can tell. The page that comes
//! with the program loads nothing from elsewhere, and its headers hold it to that.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use subtle::ConstantTimeEq;
use tower_http::catch_panic::CatchPanicLayer;

use super::chat::axum_json;
use super::error::{ApiError, ApiResult, Refusal};
use super::log::{Guarded, LogGuard, RequestLog};
use super::state::{Peer, Server};
use super::{body, chat, metrics, openapi, page, uploads, videos};

/// What the page may do: run its own files and show what a person picked.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                              connect-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; \
                              form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that a client may give a request.
const MAX_ID: usize = 128;

/// All addresses.
pub fn router(server: Arc<Server>) -> Router {
    let mut router = Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/videos/questions", post(videos::ask))
        .route("/v1/media", post(uploads::add))
        .route("/v1/media/{id}", get(uploads::describe))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(told))
        .route("/openapi.json", get(openapi::document));
    for (path, kind, bytes) in page::FILES {
        router = router.route(path, get(move || async move { page_file(kind, bytes) }));
    }
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(from_fn_with_state(Arc::clone(&server), admit))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("the server ran into a bug of its own: please report it")
                .into_response()
        }))
        .layer(from_fn_with_state(Arc::clone(&server), note))
        .with_state(server)
}

/// Gives the request its id and its line in the log.
async fn note(
    State(server): State<Arc<Server>>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    let given = request.headers().get(&REQUEST_ID);
    let given = given.and_then(|value| value.to_str().ok());
    let plain = |id: &&str| {
        let fits = |b: u8| b.is_ascii_graphic();
        (1..=MAX_ID).contains(&id.len()) && id.bytes().all(fits)
    };
    let id = match given.filter(plain) {
        Some(id) => id.to_owned(),
        None => server.ids.next("req-"),
    };
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("other", MatchedPath::as_str).to_owned();
    let client = request.extensions().get::<Peer>().map(|peer| peer.0);
    let method = match *request.method() {
        Method::GET | Method::POST | Method::HEAD | Method::OPTIONS => request.method().as_str(),
        _ => "other",
    };
    let log = RequestLog::new(id.clone(), client, method.to_owned(), route);
    let caller = server
        .traces
        .as_ref()
        .map(|traces| traces.caller(request.headers()));
    log.entry().caller = caller;
    let guard = LogGuard::new(log.clone(), Arc::clone(&server));
    let origin = request.headers().get(header::ORIGIN).cloned();
    request.extensions_mut().insert(log.clone());
    let mut response = next.run(request).await;
    {
        let mut entry = log.entry();
        entry.status = Some(response.status().as_u16());
        if let Some(Refusal(message)) = response.extensions_mut().remove() {
            entry.error = Some(message);
        }
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    guard_headers(&server, origin, response.headers_mut());
    response.map(|inner| Guarded::body(inner, guard))
}

/// Headers that keep browsers from guessing, and let allowed origins read.
fn guard_headers(server: &Server, origin: Option<HeaderValue>, headers: &mut HeaderMap) {
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    let Some(origin) = origin else { return };
    let allowed = |own: &String| own == "*" || own.as_bytes() == origin.as_bytes();
    if server.settings.origins.iter().any(allowed) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, retry-after"),
        );
    }
}

/// Lets in who may come.
async fn admit(State(server): State<Arc<Server>>, request: Request<Body>, next: Next) -> Response {
    // What looks after a server may use any name; it learns nothing else.
    let looks = matches!(request.uri().path(), "/health" | "/ready");
    if !looks && !goes_by(server.settings.hosts.as_deref(), request.headers()) {
        body::discard(request.into_body()).await;
        return ApiError::foreign_host().into_response();
    }
    if !request.uri().path().starts_with("/v1/") {
        return next.run(request).await;
    }
    let refused = match may_come(&server, &request) {
        Ok(()) if request.method() == Method::OPTIONS && is_preflight(&request) => {
            return preflight();
        }
        Ok(()) => return next.run(request).await,
        Err(error) => error,
    };
    body::discard(request.into_body()).await;
    refused.into_response()
}

/// Whether the server goes by the name in the Host header. Browsers always send one.
fn goes_by(names: Option<&[String]>, headers: &HeaderMap) -> bool {
    let (Some(names), Some(host)) = (names, headers.get(header::HOST)) else {
        return true;
    };
    let Some(host) = host
        .to_str()
        .ok()
        .and_then(|host| host.parse::<Authority>().ok())
    else {
        return false;
    };
    let name = host.host();
    let bare = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let is_address = bare.unwrap_or(name).parse::<IpAddr>().is_ok();
    let is = |own: &str| own.eq_ignore_ascii_case(name);
    is_address || is("localhost") || names.iter().any(|own| is(own))
}

fn may_come(server: &Server, request: &Request<Body>) -> ApiResult<()> {
    let headers = request.headers();
    if let Some(origin) = headers.get(header::ORIGIN) {
        let own = |origin: &str| {
            let host = headers.get(header::HOST)?.to_str().ok()?;
            let (_, authority) = origin.split_once("://")?;
            Some(authority.eq_ignore_ascii_case(host))
        };
        let origin = origin.to_str().unwrap_or_default();
        let listed = |o: &String| o == "*" || o == origin;
        if own(origin) != Some(true) && !server.settings.origins.iter().any(listed) {
            return Err(ApiError::foreign_origin());
        }
    }
    // A browser asks without the key whether it may ask with it.
    if request.method() == Method::OPTIONS && is_preflight(request) {
        return Ok(());
    }
    let Some(key) = &server.settings.api_key else {
        return Ok(());
    };
    let given = headers.get(header::AUTHORIZATION);
    let given = given.and_then(|value| value.to_str().ok()?.split_once(' '));
    match given {
        Some((scheme, given))
            if scheme.eq_ignore_ascii_case("bearer")
                && bool::from(given.trim().as_bytes().ct_eq(key.as_bytes())) =>
        {
            Ok(())
        }
        _ => Err(ApiError::unauthorized()),
    }
}

fn is_preflight(request: &Request<Body>) -> bool {
    let headers = request.headers();
    headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

fn preflight() -> Response {
    let headers = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
        (
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            "authorization, content-type, x-request-id, traceparent, tracestate",
        ),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

async fn no_such_path(request: Request<Body>) -> ApiError {
    let path = request.uri().path().to_owned();
    body::discard(request.into_body()).await;
    ApiError::no_such_path(&path)
}

fn page_file(kind: &'static str, bytes: &'static [u8]) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, CONTENT_POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, bytes).into_response()
}

fn described(server: &Server) -> serde_json::Value {
    let mut model = json!({
        "id": server.name(),
        "object": "model",
        "created": server.settings.created,
        "owned_by": "lnv",
    });
    if let Some(context) = told_context(server.settings.context) {
        model["max_model_len"] = json!(context);
    }
    model
}

/// The context, where it has an end: with dynamic scaling it has none, and JSON's numbers end at 2^53.
fn told_context(tokens: usize) -> Option<usize> {
    (tokens <= 1 << 53).then_some(tokens)
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    axum_json(&json!({"object": "list", "data": [described(&server)]}))
}

async fn model(
    State(server): State<Arc<Server>>,
    id: Result<axum::extract::Path<String>, axum::extract::rejection::PathRejection>,
) -> ApiResult<Response> {
    let id = id.map_err(|_| ApiError::bad("the name in the address is no valid text"))?;
    server.check_name(Some(id.as_str()))?;
    Ok(axum_json(&described(&server)))
}

/// The process lives, and so does its engine.
async fn health(State(server): State<Arc<Server>>) -> ApiResult<Response> {
    match server.service.is_broken() {
        true => Err(ApiError::broken()),
        false => Ok(axum_json(&json!({"status": "ok"}))),
    }
}

/// The server takes requests.
async fn ready(State(server): State<Arc<Server>>) -> ApiResult<Response> {
    if server.service.is_broken() {
        return Err(ApiError::broken());
    }
    if server.is_draining() {
        return Err(ApiError::draining());
    }
    Ok(axum_json(
        &json!({"status": "ready", "model": server.name()}),
    ))
}

async fn told(State(server): State<Arc<Server>>) -> Response {
    let text = server.metrics.text(&server);
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_without_an_end_is_not_told() {
        assert_eq!(told_context(4096), Some(4096));
        assert_eq!(told_context(usize::MAX), None);
    }

    #[test]
    fn names_that_were_not_given_are_not_gone_by() {
        let own = ["media.example.org".to_owned()];
        let by = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.extend(HeaderValue::from_str(host).map(|host| (header::HOST, host)));
            goes_by(Some(&own), &headers)
        };
        for host in [
            "127.0.0.1",
            "127.0.0.1:8000",
            "[::1]:8000",
            "[::1]",
            "192.168.0.7:80",
            "localhost:8000",
            "LocalHost",
            "media.example.org",
            "Media.Example.Org:443",
        ] {
            assert!(by(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "x@evil.example",
            "",
            "a b",
        ] {
            assert!(!by(host), "{host}");
        }
        assert!(goes_by(Some(&own), &HeaderMap::new()));
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("evil.example"));
        assert!(goes_by(None, &headers));
    }
}

//! What goes back when a request is not answered: one plain sentence in OpenAI's form.
//!
//! Decision: every refusal of the server is an [`ApiError`], so that a client written for OpenAI reads
//! each of them (`error.message`, `error.type`, `error.param`, `error.code`). What a client sent can only
//! give 4xx; 5xx is for what went wrong on this side.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use llava_next_video::Error;
use llava_next_video::engine::Refused;
use serde_json::{Value, json};

/// Seconds after which a client that was turned away may try again.
const RETRY_AFTER: &str = "2";

/// A refusal.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    /// One sentence: what was wrong, the value, what to do.
    pub message: String,
    /// Which part of the request, such as `messages[0].content`.
    pub param: Option<String>,
    /// A word for programs.
    code: Option<&'static str>,
}

/// The sentence of a refusal, for the log.
#[derive(Clone)]
pub struct Refusal(pub String);

/// `Result` with [`ApiError`].
pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            code,
            message: message.into(),
            param: None,
        }
    }

    /// 400: the request says something wrong.
    pub fn bad(message: impl Into<String>) -> Self {
        let kind = "invalid_request_error";
        Self::new(StatusCode::BAD_REQUEST, kind, None, message)
    }

    /// 400 about one part of the request.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::bad(message);
        error.param = Some(param.into());
        error.code = Some("invalid_value");
        error
    }

    /// Another word for programs.
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The part of the request that it is about.
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            Some("invalid_api_key"),
            "the API key is missing or wrong: send it as \"Authorization: Bearer KEY\"",
        )
    }

    /// 403: a page of another origin asks.
    pub fn foreign_origin() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "invalid_request_error",
            Some("origin_not_allowed"),
            "this server does not answer pages of other origins: start it with --allow-origin to let \
             this one ask",
        )
    }

    /// 403: the server does not go by this name.
    pub fn foreign_host() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "invalid_request_error",
            Some("host_not_allowed"),
            "this server does not go by the name in the Host header: ask it by its address, or start it \
             with --allow-host NAME",
        )
    }

    /// 404: no such address.
    pub fn no_such_path(path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("not_found"),
            format!("there is nothing at {path}: /openapi.json lists what there is"),
        )
    }

    /// 404: no such thing.
    pub fn not_found(param: &str, code: &'static str, message: impl Into<String>) -> Self {
        let kind = "invalid_request_error";
        Self::new(StatusCode::NOT_FOUND, kind, Some(code), message).at(param)
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            "this address does not take this method: the Allow header names those it takes",
        )
    }

    /// 408: it took too long.
    pub fn timeout(message: impl Into<String>) -> Self {
        let status = StatusCode::REQUEST_TIMEOUT;
        Self::new(status, "timeout_error", Some("timeout"), message)
    }

    /// 413.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            Some("request_too_large"),
            message,
        )
    }

    /// 429.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            Some("server_busy"),
            message,
        )
    }

    /// 503: the server is stopping.
    pub fn draining() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable_error",
            Some("draining"),
            "the server is stopping and takes no more requests: ask another one, or again later",
        )
    }

    /// 503: the engine ended by a bug, and the server can answer nobody until it is started again.
    pub fn broken() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            Some("engine_broken"),
            "the engine broke off by a bug of its own: start the server again, and please report it",
        )
    }

    /// 500: our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "server_error", Some("internal_error"), message)
    }

    /// 500 after a panic.
    pub fn bug() -> Self {
        Self::internal("the server ran into a bug of its own: please report it")
    }

    /// The body.
    pub fn json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::Input(_) | Error::Media(_) | Error::Template(_) | Error::Tokenizer(_) => {
                Self::bad(error.to_string())
            }
            Error::Cancelled => Self::timeout("the request was stopped before it was answered"),
            other => Self::internal(other.to_string()),
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full(waiting) => Self::busy(format!(
                "{waiting} requests wait already, which is all that may: try again in a moment"
            )),
            Refused::Closing => Self::draining(),
            Refused::Broken => Self::broken(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        response
            .extensions_mut()
            .insert(Refusal(self.message.clone()));
        let headers = response.headers_mut();
        let json = HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
            }
            StatusCode::UNAUTHORIZED => {
                let bearer = HeaderValue::from_static("Bearer");
                headers.insert(header::WWW_AUTHENTICATE, bearer);
            }
            // What is left of the body was not read: the connection cannot go on.
            StatusCode::REQUEST_TIMEOUT | StatusCode::PAYLOAD_TOO_LARGE => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        if self.status == StatusCode::REQUEST_TIMEOUT {
            // OpenAI's client asks again after a 408, which here would take as long as before.
            let name = HeaderName::from_static("x-should-retry");
            headers.insert(name, HeaderValue::from_static("false"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_is_not_the_clients_fault() {
        let error = ApiError::from(Error::Internal("broke off".into()));
        assert_eq!((error.status.as_u16(), error.kind), (500, "server_error"));
        let error = ApiError::from(Refused::Broken);
        assert_eq!((error.status.as_u16(), error.kind), (503, "server_error"));
    }

    #[test]
    fn a_request_that_took_too_long_is_not_sent_again() {
        let header = |error: ApiError| {
            let response = error.into_response();
            response.headers().get("x-should-retry").cloned()
        };
        let no = HeaderValue::from_static("false");
        assert_eq!(header(ApiError::timeout("late")), Some(no));
        assert_eq!(header(ApiError::busy("full")), None);
    }
}

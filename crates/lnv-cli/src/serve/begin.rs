//! How every question begins, before its prompt is made: body, fields, a place in the line, the form of the answer,
//! media.
//!
//! Decision: one order for all addresses. What costs least is looked at first, and a request has its place in the line
//! before anything is fetched or compiled for it, so that a full line turns away what has cost nothing.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, Request};
use llava_next_video::engine::Constraints;
use tokio::sync::OwnedSemaphorePermit;

use super::arriving::Read;
use super::body;
use super::content::Named;
use super::error::{ApiError, ApiResult};
use super::fields::{self, Fields};
use super::job::{Place, aside, pictures};
use super::json_schema::SchemaError;
use super::log::RequestLog;
use super::request::{ResponseFormat, Wanted};
use super::state::{Peer, Server};

/// A request that was taken.
pub struct Begun<T> {
    /// What is asked.
    pub said: T,
    /// How to answer.
    pub wanted: Wanted,
    /// What keeps the answer in form.
    pub constraints: Option<Arc<dyn Constraints>>,
    /// Whose it is, for taking turns.
    pub client: u64,
    /// Its place in the line.
    pub place: Arc<Place>,
    /// Its media, of which the last may still be being read.
    pub read: Read,
    /// The room of its body, which data URIs need until its media have been read.
    pub room: Option<OwnedSemaphorePermit>,
}

/// Reads what is asked, and which media it names, out of a body; may refuse ways of answering, or change them.
type Parse<T> = fn(&Server, &Fields, &mut Wanted) -> ApiResult<(T, Vec<Named>)>;

/// Takes a request.
///
/// # Errors
/// Anything about it is wrong, too large or too slow, or the server has no room for it.
pub async fn begin<T: Send + 'static>(
    server: &Arc<Server>,
    log: &RequestLog,
    peer: Option<Peer>,
    request: Request<Body>,
    parse: Parse<T>,
) -> ApiResult<Begun<T>> {
    let headers = request.headers().clone();
    let held = body::read(server, request, server.settings.max_body).await?;
    let (own, bytes) = (Arc::clone(server), held.bytes);
    let read = move || {
        let value = fields::parse(&bytes)?;
        let body = Fields::new(&value, "")?;
        own.check_name(body.text("model")?)?;
        let mut wanted = Wanted::read(&body, &own.settings.answers)?;
        let (said, media) = parse(&own, &body, &mut wanted)?;
        let user = body.text("user")?.map(str::to_owned);
        Ok::<_, ApiError>((said, media, wanted, user))
    };
    let (said, media, wanted, user) = aside(read).await??;
    let place = Arc::new(Place::take(server)?);
    let constraints = constraints(server, &wanted).await?;
    let read = pictures(server, log, media).await?;
    Ok(Begun {
        said,
        constraints,
        client: client(server, peer, &headers, user.as_deref()),
        wanted,
        place,
        read,
        room: held.room,
    })
}

/// What keeps the answer in form, where a form is asked for.
async fn constraints(
    server: &Arc<Server>,
    wanted: &Wanted,
) -> ApiResult<Option<Arc<dyn Constraints>>> {
    if wanted.format == ResponseFormat::Text {
        return Ok(None);
    }
    let (own, format) = (Arc::clone(server), wanted.format.clone());
    let compiled = aside(move || {
        match (&own.grammars, &format) {
        (None, _) => Err(SchemaError::Invalid(
            "this model's tokenizer cannot be followed, so its answers cannot be held to JSON: leave \
             response_format out"
                .into(),
        )),
        (Some(grammars), ResponseFormat::JsonSchema { schema, strict }) => {
            grammars.schema(schema, *strict)
        }
        (Some(grammars), _) => grammars.object(),
    }
    });
    match compiled.await? {
        Ok(constraints) => Ok(Some(constraints)),
        Err(SchemaError::Busy) => Err(ApiError::busy(SchemaError::Busy.to_string())),
        Err(SchemaError::Invalid(message)) => {
            let param = match wanted.format {
                ResponseFormat::JsonSchema { .. } => "response_format.json_schema.schema",
                _ => "response_format",
            };
            Err(ApiError::invalid(param, message))
        }
    }
}

/// Whose question it is, for taking turns: an address, as a proxy tells it where one is trusted; where keys
/// keep strangers out, the user it names. Whoever could choose it freely would have as many turns as names.
fn client(server: &Server, peer: Option<Peer>, headers: &HeaderMap, user: Option<&str>) -> u64 {
    let settings = &server.settings;
    let user = user.filter(|_| settings.api_key.is_some());
    let forwarded = match settings.trust_proxy {
        true => forwarded(headers),
        false => None,
    };
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (peer.map(|peer| peer.0), user, forwarded).hash(&mut hasher);
    hasher.finish()
}

/// The address that the proxy itself has seen: the last one. Those before are the client's words.
fn forwarded(headers: &HeaderMap) -> Option<&str> {
    let last = headers.get_all("x-forwarded-for").iter().next_back()?;
    last.to_str().ok()?.rsplit(',').next().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn of_forwarded_addresses_the_proxys_own_counts() {
        let mut headers = HeaderMap::new();
        assert_eq!(forwarded(&headers), None);
        let lines = ["1.1.1.1", "2.2.2.2, 203.0.113.9"];
        for line in lines {
            headers.append("x-forwarded-for", HeaderValue::from_static(line));
        }
        assert_eq!(forwarded(&headers), Some("203.0.113.9"));
    }
}

//! `POST /v1/media` and `GET /v1/media/{id}`: a file is sent or fetched once, looked at, and then named by many
//! requests.
//!
//! Decision: a link is fetched here as in a chat, and kept like a file that was sent, so that what a person has seen
//! is what is asked about, whatever the link leads to later. The bytes go to the store as they come, so that an upload needs no memory of its own; and
//! what comes back is what a person wants to see before asking: which frames the model would get.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{Request, header};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use llava_next_video::media::ImageSize;
use serde_json::{Map, Number, Value, json};

use super::body;
use super::chat::axum_json;
use super::content::Wish;
use super::error::{ApiError, ApiResult};
use super::fields::{self, Fields};
use super::job::{aside, refusal, take};
use super::media::{Described, MediaKind, Uploaded};
use super::state::Server;
use super::within;

/// The type of a body that is no file but says where one is.
const LINK: &str = "application/json";

/// Bytes of such a body.
const MAX_LINK: usize = 64 << 10;

type Words = Result<Query<HashMap<String, String>>, axum::extract::rejection::QueryRejection>;

/// Takes a file, or fetches one.
pub async fn add(
    State(server): State<Arc<Server>>,
    query: Words,
    request: Request<Body>,
) -> ApiResult<Response> {
    if server.is_draining() {
        body::discard(request.into_body()).await;
        return Err(ApiError::draining());
    }
    let deadline = tokio::time::Instant::now() + server.settings.timeout;
    let work = async {
        let (wish, kind) = asked(&server, query)?;
        let told = request.headers().get(header::CONTENT_TYPE);
        let told = told.and_then(|value| value.to_str().ok()).unwrap_or("");
        // A GIF is sent as a picture and may be wanted as a clip: the bytes decide where nothing is asked.
        let told_kind = match told.split('/').next() {
            Some("image") => Some(MediaKind::Image),
            Some("video") => Some(MediaKind::Video),
            _ => None,
        };
        let (uploaded, place) = match told.split(';').next().map(str::trim) {
            Some(LINK) => (linked(&server, request).await?, "url"),
            _ => (body::store(&server, request).await?, "file"),
        };
        let id = uploaded.id.as_str().to_owned();
        let answer = shown(&server, id, (wish, kind.or(told_kind)), place).await;
        // What cannot be shown cannot be asked about: it does not push out what can. Where only the wish for
        // its frames was wrong it stays, to be looked at again.
        let about_the_file = |error: &ApiError| error.param.as_deref() == Some(place);
        if answer.as_ref().err().is_some_and(about_the_file) {
            server.media.take_back(&uploaded);
        }
        answer
    };
    within(&server, deadline, work).await
}

/// Fetches what the body names, by the rules for the media of chats.
async fn linked(server: &Arc<Server>, request: Request<Body>) -> ApiResult<Uploaded> {
    let held = body::read(server, request, MAX_LINK).await?;
    let value = fields::parse(&held.bytes)?;
    let url = Fields::new(&value, "")?.text("url")?.map(str::to_owned);
    let url = url.ok_or_else(|| {
        ApiError::invalid(
            "url",
            "url is missing: give the address of a picture or a clip",
        )
        .code("missing_required_parameter")
    })?;
    let turn = take(&server.gates.fetching, 1).await?;
    let store = Arc::clone(&server.media);
    let fetched = aside(move || store.fetch_and_keep(&url)).await?;
    drop(turn);
    fetched.map_err(|error| refusal(error, "url", false))
}

/// Looks at a file that was sent before.
pub async fn describe(
    State(server): State<Arc<Server>>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
    query: Words,
) -> ApiResult<Response> {
    let deadline = tokio::time::Instant::now() + server.settings.timeout;
    let work = async {
        let (wish, kind) = asked(&server, query)?;
        let Path(id) = id.map_err(|_| ApiError::bad("the id in the address is no valid text"))?;
        if !id.starts_with("media:") {
            let message = "an id begins with media:, as POST /v1/media gives it";
            return Err(ApiError::not_found("id", "media_not_found", message));
        }
        shown(&server, id, (wish, kind), "file").await
    };
    within(&server, deadline, work).await
}

/// What the address asks for.
fn asked(server: &Server, query: Words) -> ApiResult<(Wish, Option<MediaKind>)> {
    let Query(words) = query.map_err(|_| ApiError::bad("what follows the ? is not readable"))?;
    let kind = match words.get("kind").map(String::as_str) {
        None => None,
        Some("image") => Some(MediaKind::Image),
        Some("video") => Some(MediaKind::Video),
        Some(_) => {
            let message = "kind must be image or video";
            return Err(ApiError::invalid("kind", message));
        }
    };
    let typed = |word: String| match (word.parse::<i64>(), word.parse::<f64>()) {
        (Ok(n), _) => Value::from(n),
        (_, Ok(x)) => Number::from_f64(x).map_or(Value::String(word), Value::Number),
        _ => Value::String(word),
    };
    let object: Map<String, Value> = words.into_iter().map(|(k, v)| (k, typed(v))).collect();
    let object = Value::Object(object);
    let fields = Fields::new(&object, "")?;
    Ok((Wish::read(&fields, &server.settings.media)?, kind))
}

async fn shown(
    server: &Arc<Server>,
    id: String,
    (wish, kind): (Wish, Option<MediaKind>),
    place: &str,
) -> ApiResult<Response> {
    let store = Arc::clone(&server.media);
    let bounds = server.settings.media;
    let own = id.clone();
    let turn = take(&server.gates.preparing, 1).await?;
    let asker = Arc::new(());
    let asks = Arc::downgrade(&asker);
    let described = aside(move || {
        let kind = match kind {
            Some(kind) => kind,
            None => store.kind_of(&own)?,
        };
        let source = wish.source(kind, &own, &bounds);
        Ok((kind, store.describe(&source, &asks)?))
    });
    let (kind, described) = described.await?.map_err(|e| refusal(e, place, true))?;
    drop(turn);
    Ok(axum_json(&told_of(server, &id, kind, &described)?))
}

fn told_of(server: &Server, id: &str, kind: MediaKind, media: &Described) -> ApiResult<Value> {
    let facts = server.pipeline.processor.facts();
    let tokens = match kind {
        MediaKind::Image => {
            let size = ImageSize::new(media.height, media.width);
            facts.layout(size)?.feature_tokens()
        }
        MediaKind::Video => facts.tokens_per_frame()? * media.frames.len(),
    };
    let frame = |frame: &super::media::DescribedFrame| {
        json!({
            "index": frame.index,
            "time_s": frame.time_s,
            "thumbnail": format!("data:image/jpeg;base64,{}", BASE64_STANDARD.encode(&frame.thumbnail)),
        })
    };
    Ok(json!({
        "id": id,
        "object": "media",
        "kind": match kind {
            MediaKind::Image => "image",
            MediaKind::Video => "video",
        },
        "width": media.width,
        "height": media.height,
        "duration_s": media.duration_s,
        "total_frames": media.total_frames,
        "fps": media.fps,
        "tokens": tokens,
        // Beyond this num_frames is refused.
        "max_frames": media.total_frames.map(|total| total.min(server.settings.media.max_frames)),
        "notes": media.notes,
        "frames": media.frames.iter().map(frame).collect::<Vec<_>>(),
    }))
}

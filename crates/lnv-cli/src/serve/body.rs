//! A request's body, read into memory: bounded in bytes, in time, and together with all others.
//!
//! Decision: the room for a body is taken from one common budget before its bytes are kept, so that many
//! large uploads at once are turned away (429) rather than fill the memory. A sender that stalls is cut
//! off (408).

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Request, header};
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use super::error::{ApiError, ApiResult};
use super::job::{aside, refusal};
use super::media::Uploaded;
use super::state::Server;

/// Room is taken in steps of so many KiB.
const STEP_KIB: usize = 64;

/// How long a sender may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// How long, and how much, a sender that was refused may go on before the connection is cut: most
/// clients only then read why.
const FAREWELL: Duration = Duration::from_secs(2);
const FAREWELL_BYTES: usize = 64 << 20;

/// A body and the room that it holds.
pub struct Held {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Given back when dropped.
    pub room: Option<OwnedSemaphorePermit>,
}

/// Reads the body, up to `limit` bytes.
pub async fn read(server: &Server, request: Request<Body>, limit: usize) -> ApiResult<Held> {
    let told = told_length(&request);
    let mut body = request.into_body();
    let result = match told {
        Some(length) if length > limit as u64 => Err(too_large(limit)),
        _ => keep(server, &mut body, limit).await,
    };
    if result.is_err() {
        discard(body).await;
    }
    result
}

/// What a request says of its length; it may lie.
fn told_length(request: &Request<Body>) -> Option<u64> {
    let value = request.headers().get(header::CONTENT_LENGTH)?;
    value.to_str().ok()?.parse().ok()
}

fn too_large(limit: usize) -> ApiError {
    ApiError::too_large(format!(
        "the body has more than {limit} bytes, which is all that is taken: send less, or an address \
         instead of the bytes"
    ))
}

async fn keep(server: &Server, body: &mut Body, limit: usize) -> ApiResult<Held> {
    let mut held = Held {
        bytes: Vec::new(),
        room: None,
    };
    let mut kib = 0;
    while let Some(data) = next(body).await? {
        let length = held.bytes.len() + data.len();
        if length > limit {
            return Err(too_large(limit));
        }
        // A growing Vec has up to twice its length.
        while kib << 10 < 2 * length {
            let budget = server.gates.bodies.clone();
            let room = budget.try_acquire_many_owned(STEP_KIB as u32);
            let room = room.map_err(|_| {
                ApiError::busy("too many bytes are being received at once: try again in a moment")
            })?;
            match &mut held.room {
                Some(all) => all.merge(room),
                None => held.room = Some(room),
            }
            kib += STEP_KIB;
        }
        held.bytes.extend_from_slice(&data);
    }
    Ok(held)
}

async fn next(body: &mut Body) -> ApiResult<Option<Bytes>> {
    loop {
        let frame = timeout(SILENCE, body.frame()).await.map_err(|_| {
            ApiError::timeout(format!(
                "the body stopped coming for {} seconds: send it without pauses",
                SILENCE.as_secs()
            ))
        })?;
        match frame {
            None => return Ok(None),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(cause)) => {
                return Err(ApiError::bad(format!("the body broke off: {cause}")));
            }
        }
    }
}

/// Bytes of an upload that are handed to the store at a time.
const PIECE: usize = 1 << 20;

/// Takes the body into the media store; gives its id there.
pub async fn store(server: &Arc<Server>, request: Request<Body>) -> ApiResult<Uploaded> {
    let told = told_length(&request);
    let mut body = request.into_body();
    let limit = server.settings.max_upload;
    let result = match told {
        Some(length) if length > limit as u64 => Err(too_large(limit)),
        _ => stored(server, &mut body).await,
    };
    if result.is_err() {
        discard(body).await;
    }
    result
}

async fn stored(server: &Arc<Server>, body: &mut Body) -> ApiResult<Uploaded> {
    let limit = server.settings.max_upload;
    let store = Arc::clone(&server.media);
    let begun = aside(move || store.begin_upload()).await?;
    let mut upload = begun.map_err(|e| refusal(e, "file", true))?;
    let mut length = 0;
    let mut piece = Vec::new();
    loop {
        let data = next(body).await?;
        let end = data.is_none();
        if let Some(data) = data {
            length += data.len();
            if length > limit {
                return Err(too_large(limit));
            }
            piece.extend_from_slice(&data);
        }
        if end || piece.len() >= PIECE {
            let whole = std::mem::take(&mut piece);
            let written = aside(move || {
                upload.write(&whole)?;
                Ok(upload)
            });
            upload = written.await?.map_err(|e| refusal(e, "file", true))?;
        }
        if end {
            let store = Arc::clone(&server.media);
            let uploaded = aside(move || store.finish_upload(upload)).await?;
            return uploaded.map_err(|e| refusal(e, "file", true));
        }
    }
}

/// Lets a refused sender finish, within bounds.
pub async fn discard(mut body: Body) {
    let until = Instant::now() + FAREWELL;
    let mut seen = 0;
    while seen < FAREWELL_BYTES {
        match timeout_at(until, body.frame()).await {
            Ok(Some(Ok(frame))) => seen += frame.data_ref().map_or(0, Bytes::len),
            _ => return,
        }
    }
}

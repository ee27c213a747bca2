//! `POST /v1/videos/questions`: many questions about one clip in one request.
//!
//! Decision: each question is a prompt of its own that begins with the clip, so all but the first find
//! the clip's keys and values in the engine's cache, and the answers are those that each question gets
//! alone. The first one goes ahead; the others follow a few at a time, so that a long list does not push
//! others out of the line. The request has one place in the line, from its beginning to its end: it is taken as a whole or not at all, and its questions wait for each other, not against each other.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::Request;
use axum::response::Response;
use futures_util::stream::{StreamExt, TryStreamExt, iter};
use llava_next_video::engine::{Constraints, Generation};
use llava_next_video::processor::conversation::{Conversation, Message, Role};
use serde_json::{Value, json};

use super::arriving::{Read, begin};
use super::body;
use super::chat::{axum_json, client, constraints, now, reason, text, usage, wait};
use super::content::{self, Named};
use super::error::{ApiError, ApiResult};
use super::fields::{self, Fields};
use super::job::{Asked, Job, Place, aside, pictures, prepare, question};
use super::log::RequestLog;
use super::request::Wanted;
use super::state::{Peer, Server};
use super::within;

/// Most questions of one request.
pub const MAX_QUESTIONS: usize = 256;

/// Questions of one request that the engine has at once.
pub const AT_ONCE: usize = 8;

/// A request that was read.
struct Parsed {
    video: Option<Named>,
    questions: Vec<String>,
    system: Option<String>,
    user: Option<String>,
    wanted: Wanted,
}

/// Answers the questions.
pub async fn ask(
    State(server): State<Arc<Server>>,
    Extension(log): Extension<RequestLog>,
    peer: Option<Extension<Peer>>,
    request: Request<Body>,
) -> ApiResult<Response> {
    let deadline = tokio::time::Instant::now() + server.settings.timeout;
    let peer = peer.map(|Extension(peer)| peer);
    let work = answer(&server, &log, peer, request);
    within(&server, deadline, work).await
}

async fn answer(
    server: &Arc<Server>,
    log: &RequestLog,
    peer: Option<Peer>,
    request: Request<Body>,
) -> ApiResult<Response> {
    let headers = request.headers().clone();
    let held = body::read(server, request, server.settings.max_body).await?;
    let bytes = held.bytes;
    let own = Arc::clone(server);
    let mut parsed = aside(move || parse(&own, &bytes)).await??;
    let place = Arc::new(Place::take(server)?);
    let constraints = constraints(server, &parsed.wanted).await?;
    let read = pictures(server, parsed.video.take().into_iter().collect()).await?;
    let mut asker = Asker {
        client: client(server, peer, &headers, parsed.user.as_deref()),
        server,
        log,
        parsed: &parsed,
        read,
        place,
        constraints,
    };
    let first = asker.begin().await?;
    drop(held.room);
    let asker = asker;
    let rest = iter(1..parsed.questions.len())
        .map(|index| asker.ask(index))
        .buffered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    let mut data = Vec::new();
    let mut total = [0_u64; 3];
    for (index, generation) in std::iter::once(first).chain(rest).enumerate() {
        let Some(completion) = generation.completions.first() else {
            return Err(ApiError::internal("the engine gave no answer"));
        };
        let usage = usage(&generation, 1);
        total[0] += usage["prompt_tokens"].as_u64().unwrap_or(0);
        total[1] += usage["completion_tokens"].as_u64().unwrap_or(0);
        total[2] += generation.cached_tokens as u64;
        data.push(json!({
            "index": index,
            "question": parsed.questions[index],
            "answer": text(server, &completion.ids, &parsed.wanted.options.stop),
            "finish_reason": reason(completion.finish_reason)?,
            "usage": usage,
        }));
    }
    Ok(axum_json(&json!({
        "id": server.ids.next("videoqa-"),
        "object": "list",
        "created": now(),
        "model": server.name(),
        "data": data,
        "usage": {
            "prompt_tokens": total[0],
            "completion_tokens": total[1],
            "total_tokens": total[0] + total[1],
            "prompt_tokens_details": {"cached_tokens": total[2]},
        },
    })))
}

fn parse(server: &Server, bytes: &[u8]) -> ApiResult<Parsed> {
    let value = fields::parse(bytes)?;
    let body = Fields::new(&value, "")?;
    server.check_name(body.text("model")?)?;
    let mut wanted = Wanted::read(&body, &server.settings.answers)?;
    for (key, given) in [
        ("stream", wanted.stream),
        ("n", wanted.n > 1),
        ("logprobs", wanted.options.logprobs.is_some()),
    ] {
        if given {
            let message = format!("{key} is for /v1/chat/completions only: leave it out here");
            return Err(ApiError::invalid(key, message).code("unsupported_value"));
        }
    }
    wanted.options.num_return_sequences = 1;
    Ok(Parsed {
        video: Some(content::video(&body, &server.settings.media)?),
        questions: questions(body.list("questions")?)?,
        system: body.text("system")?.map(str::to_owned),
        user: body.text("user")?.map(str::to_owned),
        wanted,
    })
}

fn questions(list: Option<&Vec<Value>>) -> ApiResult<Vec<String>> {
    let list = list.map_or(&[][..], Vec::as_slice);
    if list.is_empty() || list.len() > MAX_QUESTIONS {
        let message = format!(
            "questions has {} entries; it must be a list of 1 to {MAX_QUESTIONS} texts",
            list.len()
        );
        return Err(ApiError::invalid("questions", message));
    }
    let text = |(index, value): (usize, &Value)| match value.as_str() {
        Some(text) if !text.trim().is_empty() => Ok(text.to_owned()),
        _ => {
            let param = format!("questions[{index}]");
            let message = format!("{param} must be a text that asks something");
            Err(ApiError::invalid(param, message))
        }
    };
    list.iter().enumerate().map(text).collect()
}

struct Asker<'a> {
    server: &'a Arc<Server>,
    log: &'a RequestLog,
    parsed: &'a Parsed,
    read: Read,
    place: Arc<Place>,
    constraints: Option<Arc<dyn Constraints>>,
    client: u64,
}

impl Asker<'_> {
    /// Asks the first question, perhaps while the clip is still being read.
    async fn begin(&mut self) -> ApiResult<Generation> {
        let (conversation, asked, place) = self.question(0);
        let mut job = begin(self.server, &mut self.read, conversation, place, asked).await?;
        {
            let mut entry = self.log.entry();
            entry.media_s = self.read.pictures.seconds;
            entry.pictures = self.read.pictures.count();
        }
        wait(&mut job, self.log, Instant::now()).await
    }

    /// Asks another.
    async fn ask(&self, index: usize) -> ApiResult<Generation> {
        let (conversation, asked, place) = self.question(index);
        let pictures = self.read.pictures.clone();
        let prepared = prepare(self.server, conversation, pictures).await?;
        let mut job = Job::start(self.server, prepared, place, asked).await?;
        wait(&mut job, self.log, Instant::now()).await
    }

    fn question(&self, index: usize) -> (Conversation, Asked, Arc<Place>) {
        let mut conversation = Conversation::default();
        if let Some(system) = &self.parsed.system {
            let message = Message::text(Role::System, system.clone());
            conversation.messages.push(message);
        }
        let content = question(&self.parsed.questions[index]);
        conversation
            .messages
            .push(Message::new(Role::User, content));
        let asked = Asked {
            options: self.parsed.wanted.options.clone(),
            constraints: self.constraints.clone(),
            client: self.client,
            progress: false,
        };
        (conversation, asked, Arc::clone(&self.place))
    }
}

//! `POST /v1/videos/questions`: many questions about one clip in one request.
//!
//! Decision: each question is a prompt of its own that begins with the clip, so all but the first find
//! the clip's keys and values in the engine's cache, and the answers are those that each question gets
//! alone. The first one goes ahead; the others follow a few at a time, so that a long list does not push
//! others out of the line. The request has one place in the line, from its beginning to its end: it is taken as a whole or not at all, and its questions wait for each other, not against each other.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::Request;
use axum::response::Response;
use futures_util::stream::{StreamExt, TryStreamExt, iter};
use llava_next_video::engine::Generation;
use llava_next_video::processor::conversation::{Conversation, Message, Role};
use serde_json::{Value, json};

use super::arriving;
use super::begin::{Begun, begin};
use super::chat::{axum_json, now, reason, text, usage, wait};
use super::content::{self, Named};
use super::error::{ApiError, ApiResult};
use super::fields::Fields;
use super::job::{Asked, Job, Place, prepare, question};
use super::log::RequestLog;
use super::request::Wanted;
use super::state::{Peer, Server};
use super::within;

/// Most questions of one request.
pub const MAX_QUESTIONS: usize = 256;

/// Questions of one request that the engine has at once.
pub const AT_ONCE: usize = 8;

/// What is asked.
struct Questions {
    questions: Vec<String>,
    system: Option<String>,
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
    let mut begun = begin(server, log, peer, request, parse).await?;
    let first = first(server, log, &mut begun).await?;
    drop(begun.room.take());
    let (questions, stop) = (&begun.said.questions, &begun.wanted.options.stop);
    let asker = Asker {
        server,
        log,
        begun: &begun,
    };
    let rest = iter(1..questions.len())
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
            "question": questions[index],
            "answer": text(server, &completion.ids, stop),
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

fn parse(
    server: &Server,
    body: &Fields,
    wanted: &mut Wanted,
) -> ApiResult<(Questions, Vec<Named>)> {
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
    let video = content::video(body, &server.settings.media)?;
    let said = Questions {
        questions: questions(body.list("questions")?)?,
        system: body.text("system")?.map(str::to_owned),
    };
    Ok((said, vec![video]))
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
    begun: &'a Begun<Questions>,
}

impl Asker<'_> {
    /// Asks another.
    async fn ask(&self, index: usize) -> ApiResult<Generation> {
        let (conversation, asked, place) = question_of(self.begun, index);
        let pictures = self.begun.read.pictures.clone();
        let prepared = prepare(self.server, conversation, pictures).await?;
        let mut job = Job::start(self.server, self.log, prepared, place, asked).await?;
        wait(&mut job).await
    }
}

/// Asks the first question, perhaps while the clip is still being read.
async fn first(
    server: &Arc<Server>,
    log: &RequestLog,
    begun: &mut Begun<Questions>,
) -> ApiResult<Generation> {
    let (conversation, asked, place) = question_of(begun, 0);
    let question = (conversation, place, asked);
    let (mut job, _) = arriving::begin(server, log, &mut begun.read, question).await?;
    wait(&mut job).await
}

/// A question, and how it is to be answered.
fn question_of(begun: &Begun<Questions>, index: usize) -> (Conversation, Asked, Arc<Place>) {
    let Begun { said, wanted, .. } = begun;
    let mut conversation = Conversation::default();
    if let Some(system) = &said.system {
        let message = Message::text(Role::System, system.clone());
        conversation.messages.push(message);
    }
    let content = question(&said.questions[index]);
    conversation
        .messages
        .push(Message::new(Role::User, content));
    let asked = Asked {
        options: wanted.options.clone(),
        constraints: begun.constraints.clone(),
        client: begun.client,
        progress: false,
    };
    (conversation, asked, Arc::clone(&begun.place))
}

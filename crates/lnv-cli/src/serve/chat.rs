//! `POST /v1/chat/completions`.
//!
//! Decision: whatever can be wrong with a request is found before the answer begins, so that it has a
//! status and not only a broken stream: body, fields, media, the length of the prompt.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use llava_next_video::engine::{FinishReason, Generation};
use llava_next_video::processor::conversation::Conversation;
use serde_json::{Value, json};

use super::arriving;
use super::begin::{Begun, begin};
use super::content::{self, Named};
use super::error::{ApiError, ApiResult};
use super::events;
use super::fields::Fields;
use super::job::{Asked, Job, Update};
use super::log::RequestLog;
use super::logprobs::{self, Teller};
use super::request::Wanted;
use super::state::{Peer, Server};
use super::within;
use crate::stream::AnswerText;

/// Answers a chat.
pub async fn complete(
    State(server): State<Arc<Server>>,
    Extension(log): Extension<RequestLog>,
    peer: Option<Extension<Peer>>,
    request: Request<Body>,
) -> ApiResult<Response> {
    let deadline = tokio::time::Instant::now() + server.settings.timeout;
    let peer = peer.map(|Extension(peer)| peer);
    let work = answer(&server, &log, peer, request, deadline);
    within(&server, deadline, work).await
}

async fn answer(
    server: &Arc<Server>,
    log: &RequestLog,
    peer: Option<Peer>,
    request: Request<Body>,
    deadline: tokio::time::Instant,
) -> ApiResult<Response> {
    let begun = begin(server, log, peer, request, parse).await?;
    let Begun {
        wanted, mut read, ..
    } = begun;
    let asked = Asked {
        options: wanted.options.clone(),
        constraints: begun.constraints,
        client: begun.client,
        progress: wanted.stream && wanted.progress,
    };
    let question = (begun.said, begun.place, asked);
    let (job, prompt_tokens) = arriving::begin(server, log, &mut read, question).await?;
    drop(begun.room);
    let answer = Answer {
        server: Arc::clone(server),
        log: log.clone(),
        id: server.ids.next("chatcmpl-"),
        created: now(),
        wanted,
        media_s: log.entry().media_s(),
        prompt_tokens,
        job,
    };
    if answer.wanted.stream {
        log.entry().stream = true;
        return Ok(events::respond(answer, deadline));
    }
    Ok(axum_json(&answer.whole().await?))
}

fn parse(server: &Server, body: &Fields, _: &mut Wanted) -> ApiResult<(Conversation, Vec<Named>)> {
    content::messages(body, &server.settings.media)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

/// A JSON answer.
pub fn axum_json(value: &Value) -> Response {
    let json = [("content-type", "application/json")];
    (json, value.to_string()).into_response()
}

/// A question that is being answered.
pub struct Answer {
    /// The server.
    pub server: Arc<Server>,
    /// What is known of the request.
    pub log: RequestLog,
    /// As the client sees it.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// What the client asked for.
    pub wanted: Wanted,
    /// Seconds for media.
    pub media_s: f64,
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// The engine's side.
    pub job: Job,
}

impl Answer {
    /// Waits for the whole answer.
    async fn whole(mut self) -> ApiResult<Value> {
        let generation = wait(&mut self.job).await?;
        let mut choices = Vec::new();
        for index in 0..self.wanted.n {
            let Choice {
                text,
                reason,
                logprobs,
            } = self.choice(&generation, index)?;
            choices.push(json!({
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": logprobs::field(logprobs),
                "finish_reason": reason,
            }));
        }
        Ok(json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.server.name(),
            "choices": choices,
            "usage": usage(&generation, self.wanted.n),
            "lnv": {"timings": timings(&generation, self.media_s)},
        }))
    }

    fn choice(&self, generation: &Generation, index: usize) -> ApiResult<Choice> {
        let index = index % generation.completions.len().max(1);
        let Some(completion) = generation.completions.get(index) else {
            return Err(ApiError::internal("the engine gave no answer"));
        };
        let text = text(&self.server, &completion.ids, &self.wanted.options.stop);
        let teller = Teller::new(&self.server.pipeline.processor.tokenizer);
        let eos = &self.server.settings.eos;
        let shown = completion
            .logprobs
            .iter()
            .filter(|token| !eos.contains(&token.id));
        let told = || shown.map(|token| teller.tell(token)).collect();
        Ok(Choice {
            text,
            reason: reason(completion.finish_reason)?,
            logprobs: self.wanted.options.logprobs.map(|_| told()),
        })
    }
}

/// One of the answers.
struct Choice {
    text: String,
    reason: &'static str,
    logprobs: Option<Vec<Value>>,
}

/// Waits for an answer.
pub async fn wait(job: &mut Job) -> ApiResult<Generation> {
    loop {
        match job.next().await {
            Some(Update::Progress(_)) => {}
            Some(Update::Done(result)) => return Ok((*result)?),
            None => return Err(ApiError::internal("the engine gave no answer")),
        }
    }
}

/// The text of ids, as a stream of them would show it.
pub fn text(server: &Server, ids: &[u32], stop: &[String]) -> String {
    let tokenizer = &server.pipeline.processor.tokenizer;
    let mut answer = AnswerText::new(tokenizer, stop.to_vec());
    let shown = ids.iter().filter(|id| !server.settings.eos.contains(id));
    let mut text: String = shown.map(|id| answer.push(*id)).collect();
    text += &answer.finish();
    text
}

/// OpenAI's word for how an answer ended.
pub fn reason(reason: FinishReason) -> ApiResult<&'static str> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::Cancelled => Err(ApiError::draining()),
    }
}

/// Tokens of a request with `n` answers.
pub fn usage(generation: &Generation, n: usize) -> Value {
    let lengths = generation.completions.iter().map(|c| c.ids.len());
    let made = generation.completions.len().max(1);
    let new = lengths.sum::<usize>() * (n / made).max(1);
    let prompt: usize = generation.prompt_tokens.iter().sum();
    let mut usage = tokens(prompt, new);
    usage["prompt_tokens_details"] = json!({"cached_tokens": generation.cached_tokens});
    usage
}

/// Tokens of a prompt and of what was said to it so far.
pub fn tokens(prompt: usize, new: usize) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new})
}

/// Seconds by stage.
pub fn timings(generation: &Generation, media_s: f64) -> Value {
    let t = &generation.timings;
    json!({
        "media_s": media_s,
        "vision_s": t.vision_s,
        "prefill_s": t.prefill_s,
        "decode_s": t.decode_s,
        "decode_steps": t.decode_steps,
    })
}

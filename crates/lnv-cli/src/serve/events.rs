//! A chat's answer as server-sent events.
//!
//! Decision: the stream is pulled. Each time the connection can take more, all tokens that have come are
//! made into one event, so a slow reader gets fewer and larger ones and nothing piles up. While nothing
//! comes a comment is sent, which also finds out that a client has vanished. What goes wrong after the
//! first byte is an event with `error`, as OpenAI sends it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use llava_next_video::engine::{Event, Generation, TokenLogprob};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::chat::{Answer, reason, timings, tokens, usage};
use super::error::{ApiError, ApiResult};
use super::job::Update;
use super::logprobs::{self, Teller};
use super::timed_out;
use crate::stream::AnswerText;

/// How long a stream is silent.
const SILENCE: Duration = Duration::from_secs(10);

/// Most updates that become one event.
const MERGED: usize = 256;

/// The response whose body writes `answer`.
pub fn respond(answer: Answer, deadline: Instant) -> Response {
    let headers = [
        ("content-type", "text/event-stream; charset=utf-8"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
    ];
    let events = Events::new(answer, deadline);
    let body = stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<_, Infallible>(bytes), events))
    });
    (headers, Body::from_stream(body)).into_response()
}

/// What is new of a sequence.
#[derive(Clone, Default)]
struct Delta {
    text: String,
    tokens: Vec<TokenLogprob>,
}

struct Events {
    answer: Answer,
    /// Of each sequence of the engine.
    texts: Vec<AnswerText>,
    /// Tokens so far, of all sequences.
    tokens: usize,
    deadline: Instant,
    queue: VecDeque<Bytes>,
    over: bool,
}

impl Events {
    fn new(answer: Answer, deadline: Instant) -> Self {
        let tokenizer = &answer.server.pipeline.processor.tokenizer;
        let stop = &answer.wanted.options.stop;
        let sequences = answer.wanted.options.num_return_sequences;
        let text = |_| AnswerText::new(tokenizer, stop.clone());
        let texts = (0..sequences).map(text).collect();
        let mut events = Self {
            texts,
            tokens: 0,
            deadline,
            queue: VecDeque::new(),
            over: false,
            answer,
        };
        for index in 0..events.answer.wanted.n {
            let delta = json!({"role": "assistant", "content": ""});
            events.choice(index, delta, Value::Null, None);
        }
        if events.answer.wanted.progress {
            events.stage("media", 1, 1);
        }
        events
    }

    /// The next bytes, `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.queue.pop_front() {
                return Some(bytes);
            }
            if self.over {
                return None;
            }
            let silence = Instant::now() + SILENCE;
            let update = tokio::select! {
                update = timeout_at(self.deadline, self.answer.job.next()) => update,
                () = sleep_until(silence) => {
                    self.queue.push_back(Bytes::from_static(b": still here\n\n"));
                    continue;
                }
            };
            let result = match update {
                Ok(Some(update)) => self.take(update),
                Ok(None) => Err(ApiError::internal("the engine gave no answer")),
                Err(_) => Err(timed_out(&self.answer.server)),
            };
            if let Err(error) = result {
                self.answer.log.entry().error = Some(error.message.clone());
                self.send(&error.json());
                self.end();
            }
        }
    }

    /// Makes events of an update and of those that came meanwhile.
    fn take(&mut self, first: Update) -> ApiResult<()> {
        let mut deltas = vec![Delta::default(); self.texts.len()];
        let mut next = Some(first);
        for _ in 0..MERGED {
            match next.take().or_else(|| self.answer.job.ready()) {
                None => break,
                Some(Update::Progress(Event::Token {
                    sequence,
                    id,
                    logprob,
                })) => {
                    self.tokens += 1;
                    let eos = self.answer.server.settings.eos.contains(&id);
                    if let (Some(text), false) = (self.texts.get_mut(sequence), eos) {
                        deltas[sequence].text += &text.push(id);
                        deltas[sequence].tokens.extend(logprob);
                    }
                }
                Some(Update::Progress(Event::Vision { done, total })) => {
                    self.stage("vision", done, total);
                }
                Some(Update::Progress(Event::Prefill { done, total })) => {
                    self.stage("prefill", done, total);
                }
                Some(Update::Done(result)) => {
                    self.deltas(&deltas);
                    return self.finish(&(*result)?);
                }
            }
        }
        self.deltas(&deltas);
        Ok(())
    }

    fn finish(&mut self, generation: &Generation) -> ApiResult<()> {
        let rest = self.texts.iter_mut().map(|text| Delta {
            text: text.finish(),
            tokens: Vec::new(),
        });
        let rest: Vec<Delta> = rest.collect();
        self.deltas(&rest);
        for index in 0..self.answer.wanted.n {
            let sequence = index % generation.completions.len().max(1);
            let Some(completion) = generation.completions.get(sequence) else {
                return Err(ApiError::internal("the engine gave no answer"));
            };
            let reason = reason(completion.finish_reason)?;
            self.choice(index, json!({}), Value::Null, Some(reason));
        }
        if self.answer.wanted.include_usage {
            let usage = usage(generation, self.answer.wanted.n);
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage;
            self.send(&chunk);
        }
        if self.answer.wanted.progress {
            let mut chunk = self.chunk(json!([]));
            chunk["lnv"] = json!({"timings": timings(generation, self.answer.media_s)});
            self.send(&chunk);
        }
        self.end();
        Ok(())
    }

    /// Events for new text; a greedy answer's goes to each of the choices that it stands for.
    fn deltas(&mut self, deltas: &[Delta]) {
        let wanted = self.answer.wanted.options.logprobs.is_some();
        let tokenizer = self.answer.server.pipeline.processor.tokenizer.clone();
        let teller = Teller::new(&tokenizer);
        for index in 0..self.answer.wanted.n {
            let delta = &deltas[index % deltas.len()];
            if !delta.text.is_empty() || !delta.tokens.is_empty() {
                let told = delta.tokens.iter().map(|token| teller.tell(token));
                let told = logprobs::field(wanted.then(|| told.collect()));
                self.choice(index, json!({"content": delta.text}), told, None);
            }
        }
    }

    fn choice(&mut self, index: usize, delta: Value, logprobs: Value, reason: Option<&str>) {
        let choice = json!([{
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }]);
        let chunk = self.chunk(choice);
        self.send(&chunk);
    }

    fn stage(&mut self, stage: &str, done: usize, total: usize) {
        if self.answer.wanted.progress {
            let mut chunk = self.chunk(json!([]));
            chunk["lnv"] = json!({"stage": stage, "done": done, "total": total});
            self.send(&chunk);
        }
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.answer.id,
            "object": "chat.completion.chunk",
            "created": self.answer.created,
            "model": self.answer.server.name(),
            "choices": choices,
        });
        if self.answer.wanted.usage_so_far {
            let new = self.tokens * (self.answer.wanted.n / self.texts.len().max(1)).max(1);
            chunk["usage"] = tokens(self.answer.prompt_tokens, new);
        } else if self.answer.wanted.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn send(&mut self, value: &Value) {
        self.queue.push_back(format!("data: {value}\n\n").into());
    }

    fn end(&mut self) {
        self.queue
            .push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.over = true;
    }
}

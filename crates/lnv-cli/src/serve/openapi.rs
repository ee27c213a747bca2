//! `/openapi.json`: what the server takes and gives, for programs.
//!
//! Decision: written by hand beside the readers that it describes, because those are written by hand too;
//! limits stand in it as they are set. A test holds it against the routes.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use super::chat::axum_json;
use super::state::Server;
use super::videos::MAX_QUESTIONS;

/// The document.
pub async fn document(State(server): State<Arc<Server>>) -> Response {
    axum_json(&describe(&Limits {
        tokens: server.settings.answers.max_tokens,
        frames: server.settings.media.max_frames,
        keyed: server.settings.api_key.is_some(),
    }))
}

/// What differs between servers.
pub struct Limits {
    tokens: usize,
    frames: usize,
    keyed: bool,
}

fn describe(limits: &Limits) -> Value {
    let security = match limits.keyed {
        true => json!([{"key": []}]),
        false => json!([]),
    };
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "lnv serve",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Questions about videos and images, in the form of OpenAI's API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths(&security),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas(limits),
        },
    })
}

fn refer(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn body(name: &str) -> Value {
    json!({"application/json": {"schema": refer(name)}})
}

/// Answers of an operation: one that is well, and refusals.
fn responses(ok: &Value, description: &str, refusals: &[u16]) -> Value {
    let mut all = json!({"200": {"description": description, "content": ok}});
    for status in refusals {
        let description = match status {
            400 => "The request says something wrong; param names it.",
            401 => "The key is missing or wrong.",
            403 => {
                "A page of another origin asked, or the server was asked by a name that it does not go by."
            }
            404 => "There is no such thing.",
            408 => "It took too long.",
            413 => "The body is too large.",
            429 => "Too many requests wait: again after Retry-After seconds.",
            500 => "A bug of the server.",
            _ => "The server is stopping, or its engine broke off.",
        };
        let mut refusal = json!({"description": description, "content": body("Error")});
        if matches!(status, 429 | 503) {
            let seconds = json!({"schema": {"type": "integer"}, "description": "Seconds."});
            refusal["headers"] = json!({"Retry-After": seconds});
        }
        all[status.to_string()] = refusal;
    }
    all
}

fn paths(security: &Value) -> Value {
    const WORK: [u16; 8] = [400, 401, 403, 408, 413, 429, 500, 503];
    const ASK: [u16; 9] = [400, 401, 403, 404, 408, 413, 429, 500, 503];
    const LOOK: [u16; 7] = [400, 401, 403, 404, 408, 429, 500];
    let text = |kind: &str| json!({kind: {"schema": {"type": "string"}}});
    let mut chat = body("ChatCompletion");
    chat["text/event-stream"] = json!({"schema": {
        "type": "string",
        "description": "Lines of \"data: \" and a ChatCompletionChunk, the last one \"data: [DONE]\".",
    }});
    let file = json!({
        "required": true,
        "content": {
            "video/*": {"schema": {"type": "string", "format": "binary"}},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": refer("MediaLink")},
        },
    });
    let id = |about: &str| {
        json!({
            "name": "id", "in": "path", "required": true, "description": about,
            "schema": {"type": "string", "minLength": 1},
        })
    };
    let mut one = sampling_parameters();
    if let Some(list) = one.as_array_mut() {
        list.insert(0, id("As POST /v1/media gave it."));
    }
    json!({
        "/v1/chat/completions": {"post": {
            "operationId": "createChatCompletion",
            "summary": "Answer a chat about videos and images.",
            "security": security,
            "requestBody": {"required": true, "content": body("ChatCompletionRequest")},
            "responses": responses(&chat, "The answer; by events where stream is true.", &ASK),
        }},
        "/v1/videos/questions": {"post": {
            "operationId": "askVideo",
            "summary": "Answer many questions about one video.",
            "security": security,
            "requestBody": {"required": true, "content": body("VideoQuestionsRequest")},
            "responses": responses(&body("VideoAnswers"), "The answers, in order.", &ASK),
        }},
        "/v1/media": {"post": {
            "operationId": "addMedia",
            "summary": "Send a file, or have one fetched, that requests can then name.",
            "security": security,
            "parameters": sampling_parameters(),
            "requestBody": file,
            "responses": responses(&body("Media"), "What it is.", &WORK),
        }},
        "/v1/media/{id}": {"get": {
            "operationId": "describeMedia",
            "summary": "Look at a file that was sent.",
            "security": security,
            "parameters": one,
            "responses": responses(&body("Media"), "What it is.", &LOOK),
        }},
        "/v1/models": {"get": {
            "operationId": "listModels",
            "summary": "The model of this server.",
            "security": security,
            "responses": responses(&body("ModelList"), "A list of one.", &[401, 403]),
        }},
        "/v1/models/{id}": {"get": {
            "operationId": "getModel",
            "summary": "The model of this server, by name.",
            "security": security,
            "parameters": [id("Its name.")],
            "responses": responses(&body("Model"), "The model.", &[400, 401, 403, 404]),
        }},
        "/health": {"get": {
            "operationId": "health",
            "summary": "Whether the process lives.",
            "responses": responses(&body("Status"), "It lives.", &[503]),
        }},
        "/ready": {"get": {
            "operationId": "ready",
            "summary": "Whether requests are taken.",
            "responses": responses(&body("Status"), "They are.", &[503]),
        }},
        "/metrics": {"get": {
            "operationId": "metrics",
            "summary": "Figures for Prometheus.",
            "responses": responses(&text(super::metrics::CONTENT_TYPE), "OpenMetrics.", &[]),
        }},
        "/openapi.json": {"get": {
            "operationId": "openapi",
            "summary": "This document.",
            "responses": responses(
                &json!({"application/json": {"schema": {"type": "object"}}}), "It.", &[]),
        }},
    })
}

fn sampling_parameters() -> Value {
    let of = |name: &str, about: &str, schema: Value| json!({"name": name, "in": "query", "description": about, "schema": schema});
    json!([
        of(
            "num_frames",
            "Frames to take, evenly spread; not with fps.",
            json!({"type": "integer", "minimum": 1}),
        ),
        of(
            "fps",
            "Frames a second to take; not with num_frames.",
            json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1000}),
        ),
        of(
            "start",
            "Where to begin, in seconds.",
            json!({"type": "number", "minimum": 0, "maximum": 1e6})
        ),
        of(
            "end",
            "Where to end, in seconds; after start.",
            json!({"type": "number", "minimum": 0, "maximum": 1e6}),
        ),
        of(
            "kind",
            "As what to look at it; told from its type or bytes where absent.",
            json!({"type": "string", "enum": ["image", "video"]}),
        ),
    ])
}

fn schemas(limits: &Limits) -> Value {
    let mut all = json!({
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }},
        },
        "Status": {
            "type": "object",
            "required": ["status"],
            "properties": {"status": {"type": "string"}, "model": {"type": "string"}},
        },
        "Model": {
            "type": "object",
            "required": ["id", "object", "created", "owned_by"],
            "properties": {
                "id": {"type": "string"},
                "object": {"const": "model"},
                "created": {"type": "integer"},
                "owned_by": {"type": "string"},
                "max_model_len": {"type": "integer", "description": "Tokens of the context; absent where it has no end."},
            },
        },
        "ModelList": {
            "type": "object",
            "required": ["object", "data"],
            "properties": {
                "object": {"const": "list"},
                "data": {"type": "array", "items": refer("Model")},
            },
        },
        "Media": media_schema(),
        "MediaLink": {
            "type": "object",
            "required": ["url"],
            "properties": {"url": {"type": "string", "minLength": 1, "maxLength": 8192,
                                   "description": "http: or https:, of a picture or a clip."}},
        },
        "Usage": {
            "type": "object",
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
            "properties": {
                "prompt_tokens": {"type": "integer"},
                "completion_tokens": {"type": "integer"},
                "total_tokens": {"type": "integer"},
                "prompt_tokens_details": {
                    "type": "object",
                    "required": ["cached_tokens"],
                    "properties": {"cached_tokens": {"type": "integer"}},
                },
            },
        },
        "FinishReason": {"type": "string", "enum": ["stop", "length"]},
    });
    all["ChatCompletionRequest"] = chat_request(limits);
    all["Message"] = message_schema();
    all["ContentPart"] = part_schema(limits);
    all["VideoQuestionsRequest"] = questions_request(limits);
    all["ChatCompletion"] = chat_schema();
    all["ChatCompletionChunk"] = chunk_schema();
    all["VideoAnswers"] = answers_schema();
    all["LogProbs"] = logprobs_schema();
    all
}

fn media_schema() -> Value {
    json!({
        "type": "object",
        "required": ["id", "object", "kind", "width", "height", "duration_s", "tokens", "frames"],
        "properties": {
            "id": {"type": "string", "description": "An address for chats: media: and letters."},
            "object": {"const": "media"},
            "kind": {"type": "string", "enum": ["image", "video"]},
            "width": {"type": "integer"},
            "height": {"type": "integer"},
            "duration_s": {"type": ["number", "null"]},
            "total_frames": {"type": ["integer", "null"]},
            "fps": {"type": ["number", "null"]},
            "tokens": {"type": "integer", "description": "What it takes of the context."},
            "max_frames": {"type": ["integer", "null"],
                           "description": "Most frames that may be asked of this clip."},
            "notes": {"type": "array", "items": {"type": "string"}},
            "frames": {"type": "array", "items": {
                "type": "object",
                "required": ["index", "time_s", "thumbnail"],
                "properties": {
                    "index": {"type": "integer"},
                    "time_s": {"type": "number"},
                    "thumbnail": {"type": "string", "description": "A data URI of a JPEG."},
                },
            }},
        },
    })
}

/// How to answer: fields that both kinds of request have.
fn answer_fields(limits: &Limits) -> Value {
    let tokens = json!({"type": ["integer", "null"], "minimum": 1, "maximum": limits.tokens});
    let share = json!({"type": ["number", "null"], "minimum": 0, "maximum": 1});
    json!({
        "model": {"type": ["string", "null"], "description": "As /v1/models names it."},
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2,
                        "description": "0 or absent: the best token each time."},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": -1, "maximum": 1 << 24},
        "min_p": share,
        "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 10},
        "seed": {"type": ["integer", "null"]},
        "stop": {"anyOf": [
            {"type": "null"},
            {"type": "string", "minLength": 1, "maxLength": 256},
            {"type": "array", "maxItems": 64,
             "items": {"type": "string", "minLength": 1, "maxLength": 256}},
        ]},
        "user": {"type": ["string", "null"]},
        "response_format": {"anyOf": [
            {"type": "null"},
            {"type": "object", "required": ["type"],
             "properties": {"type": {"enum": ["text", "json_object"]}}},
            {"type": "object", "required": ["type", "json_schema"],
             "properties": {
                 "type": {"const": "json_schema"},
                 "json_schema": {"type": "object", "required": ["schema"],
                                 "properties": {"name": {"type": "string"},
                                                "schema": {"type": "object"}}},
             }},
        ]},
        "mm_processor_kwargs": {"anyOf": [{"type": "null"}, frames_schema(limits)]},
        "media_io_kwargs": {"type": ["object", "null"], "properties": {
            "video": {"anyOf": [{"type": "null"}, frames_schema(limits)]},
        }},
    })
}

/// Which frames.
fn frames_schema(limits: &Limits) -> Value {
    json!({
        "type": "object",
        "properties": {
            "num_frames": {"type": ["integer", "null"], "minimum": 1, "maximum": limits.frames},
            "fps": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1000},
            "start": {"type": ["number", "null"], "minimum": 0, "maximum": 1e6},
            "end": {"type": ["number", "null"], "minimum": 0, "maximum": 1e6},
        },
    })
}

fn chat_request(limits: &Limits) -> Value {
    let mut properties = answer_fields(limits);
    let own = json!({
        "messages": {"type": "array", "minItems": 1, "maxItems": 4096, "items": refer("Message")},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 16},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": {"type": ["object", "null"],
                           "properties": {"include_usage": {"type": ["boolean", "null"]},
                                          "continuous_usage_stats": {"type": ["boolean", "null"]}}},
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        "lnv": {"type": ["object", "null"],
                "properties": {"progress": {"type": ["boolean", "null"]}}},
    });
    merge(&mut properties, own);
    json!({"type": "object", "required": ["messages"], "properties": properties})
}

fn questions_request(limits: &Limits) -> Value {
    let mut properties = answer_fields(limits);
    let mut clip = frames_schema(limits);
    clip["required"] = json!(["url"]);
    clip["properties"]["url"] = json!({"type": "string", "minLength": 1});
    let own = json!({
        "video": {"anyOf": [{"type": "string", "minLength": 1}, clip]},
        "questions": {"type": "array", "minItems": 1, "maxItems": MAX_QUESTIONS,
                      "items": {"type": "string", "minLength": 1}},
        "system": {"type": ["string", "null"]},
    });
    merge(&mut properties, own);
    json!({"type": "object", "required": ["video", "questions"], "properties": properties})
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

fn message_schema() -> Value {
    json!({
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": refer("ContentPart")},
            ]},
        },
    })
}

fn part_schema(limits: &Limits) -> Value {
    let url = json!({"type": "string", "minLength": 1,
        "description": "http:, https:, data:, media: or, where allowed, a local file."});
    let image = json!({"anyOf": [url, {
        "type": "object", "required": ["url"], "properties": {"url": url},
    }]});
    let mut clip = frames_schema(limits);
    clip["required"] = json!(["url"]);
    clip["properties"]["url"] = url.clone();
    let video = json!({"anyOf": [url, clip]});
    let part = |kind: &str, key: &str, schema: &Value| {
        json!({
            "type": "object",
            "required": ["type", key],
            "properties": {"type": {"const": kind}, key: schema},
        })
    };
    json!({"anyOf": [
        part("text", "text", &json!({"type": "string"})),
        part("image_url", "image_url", &image),
        part("video_url", "video_url", &video),
        part("input_image", "image_url", &image),
        part("input_video", "video_url", &video),
        part("image", "image", &image),
        part("video", "video", &video),
    ]})
}

fn chat_schema() -> Value {
    json!({
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "chat.completion"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {
                "type": "object",
                "required": ["index", "message", "logprobs", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "message": {
                        "type": "object",
                        "required": ["role", "content"],
                        "properties": {
                            "role": {"const": "assistant"},
                            "content": {"type": "string"},
                            "refusal": {"type": "null"},
                        },
                    },
                    "logprobs": refer("LogProbs"),
                    "finish_reason": refer("FinishReason"),
                },
            }},
            "usage": refer("Usage"),
            "lnv": {"type": "object"},
        },
    })
}

fn chunk_schema() -> Value {
    json!({
        "type": "object",
        "required": ["id", "object", "created", "model", "choices"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "chat.completion.chunk"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {
                "type": "object",
                "required": ["index", "delta", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "delta": {"type": "object", "properties": {
                        "role": {"const": "assistant"},
                        "content": {"type": "string"},
                    }},
                    "logprobs": refer("LogProbs"),
                    "finish_reason": {"anyOf": [{"type": "null"}, refer("FinishReason")]},
                },
            }},
            "usage": {"anyOf": [{"type": "null"}, refer("Usage")]},
            "lnv": {"type": "object"},
        },
    })
}

fn answers_schema() -> Value {
    json!({
        "type": "object",
        "required": ["id", "object", "created", "model", "data", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "list"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {"type": "array", "items": {
                "type": "object",
                "required": ["index", "question", "answer", "finish_reason", "usage"],
                "properties": {
                    "index": {"type": "integer"},
                    "question": {"type": "string"},
                    "answer": {"type": "string"},
                    "finish_reason": refer("FinishReason"),
                    "usage": refer("Usage"),
                },
            }},
            "usage": refer("Usage"),
        },
    })
}

fn logprobs_schema() -> Value {
    let token = json!({
        "token": {"type": "string"},
        "logprob": {"type": "number"},
        "bytes": {"type": ["array", "null"], "items": {"type": "integer"}},
    });
    let mut with_others = token.clone();
    with_others["top_logprobs"] = json!({"type": "array", "items": {
        "type": "object", "required": ["token", "logprob", "bytes"], "properties": token,
    }});
    json!({"anyOf": [{"type": "null"}, {
        "type": "object",
        "required": ["content"],
        "properties": {"content": {"type": "array", "items": {
            "type": "object",
            "required": ["token", "logprob", "bytes", "top_logprobs"],
            "properties": with_others,
        }}},
    }]})
}

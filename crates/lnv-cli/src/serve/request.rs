//! What a request asks of the answer: OpenAI's sampling fields, and vLLM's beside them, to the engine's
//! options.
//!
//! Decision: an answer is greedy unless the request or the checkpoint's `generation_config.json` samples,
//! as everywhere in this program; `n` greedy answers are one answer, written `n` times. A field that
//! would change the answer and is not supported is refused, never ignored; fields that this server does
//! not know are ignored, as OpenAI's clients expect.

use std::hash::{BuildHasher, RandomState};

use llava_next_video::config::GenerationConfig;
use llava_next_video::engine::{GenerationOptions, MAX_STOP_STRINGS, Sampling};
use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::fields::Fields;

/// Most answers to one prompt.
const MAX_ANSWERS: i64 = 16;

/// Most alternatives told of each token.
const MAX_TOP_LOGPROBS: i64 = 20;

/// The longest text that ends an answer, in bytes.
const MAX_STOP_BYTES: usize = 1024;

/// What the server allows and takes for granted.
#[derive(Debug, Clone)]
pub struct AnswerBounds {
    /// Most new tokens.
    pub max_tokens: usize,
    /// New tokens where the request does not say.
    pub default_tokens: usize,
    /// What the checkpoint likes.
    pub defaults: GenerationConfig,
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum ResponseFormat {
    /// Anything.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON of this schema; `strict` refuses one that cannot be kept to in all it says.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// See above.
        strict: bool,
    },
}

/// How to answer.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The engine's options.
    pub options: GenerationOptions,
    /// Answers to write: the engine's, or copies of its one.
    pub n: usize,
    /// What the answer must look like.
    pub format: ResponseFormat,
    /// By SSE.
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// In each chunk the usage so far, as vLLM has it.
    pub usage_so_far: bool,
    /// Chunks that tell of the stages.
    pub progress: bool,
}

impl Wanted {
    /// Reads the fields.
    pub fn read(body: &Fields<'_>, bounds: &AnswerBounds) -> ApiResult<Self> {
        refuse_unsupported(body)?;
        let n = body.integer("n", 1..=MAX_ANSWERS)?.unwrap_or(1) as usize;
        let sampling = sampling(body, &bounds.defaults)?;
        let stream = body.flag("stream")?.unwrap_or(false);
        let (include_usage, usage_so_far) = match body.get("stream_options") {
            Some(value) => {
                let of = Fields::new(value, "stream_options")?;
                (
                    of.flag("include_usage")?,
                    of.flag("continuous_usage_stats")?,
                )
            }
            None => (None, None),
        };
        let include_usage = include_usage.unwrap_or(false);
        let progress = match body.get("lnv") {
            Some(value) => Fields::new(value, "lnv")?.flag("progress")?,
            None => None,
        };
        let seed = body.integer("seed", i64::MIN..=i64::MAX)?;
        let options = GenerationOptions {
            max_new_tokens: Some(new_tokens(body, bounds)?),
            sampling,
            // Without a seed, equal requests are to be answered differently.
            seed: seed.map_or_else(random, |seed| seed as u64),
            repetition_penalty: repetition_penalty(body)?,
            num_beams: Some(1),
            num_return_sequences: if sampling.is_some() { n } else { 1 },
            stop: stop(body)?,
            logprobs: logprobs(body)?,
            ..GenerationOptions::default()
        };
        Ok(Self {
            options,
            n,
            format: format(body)?,
            stream,
            include_usage,
            usage_so_far: include_usage && usage_so_far.unwrap_or(false),
            progress: progress.unwrap_or(false),
        })
    }
}

/// A number that nobody can foresee.
pub fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// Settings of OpenAI's that would change the answer and are not there.
fn refuse_unsupported(body: &Fields<'_>) -> ApiResult<()> {
    for key in ["frequency_penalty", "presence_penalty"] {
        if body.number(key, -2.0..=2.0)?.is_some_and(|x| x != 0.0) {
            let message = format!("{key} is not supported: use repetition_penalty");
            return Err(ApiError::invalid(key, message).code("unsupported_value"));
        }
    }
    for key in ["tools", "functions", "logit_bias"] {
        let empty = match body.get(key) {
            None => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !empty {
            let message = format!("{key} is not supported by this model: leave it out");
            return Err(ApiError::invalid(key, message).code("unsupported_value"));
        }
    }
    Ok(())
}

/// `max_completion_tokens`, or its old name.
fn new_tokens(body: &Fields<'_>, bounds: &AnswerBounds) -> ApiResult<usize> {
    let most = bounds.max_tokens as i64;
    let old = body.integer("max_tokens", 1..=most)?;
    let new = body.integer("max_completion_tokens", 1..=most)?;
    let wanted = new.or(old).map(|n| n as usize);
    Ok(wanted.unwrap_or(bounds.default_tokens.min(bounds.max_tokens)))
}

fn sampling(body: &Fields<'_>, defaults: &GenerationConfig) -> ApiResult<Option<Sampling>> {
    let temperature = body.number("temperature", 0.0..=2.0)?;
    let top_p = body.number("top_p", 0.0..=1.0)?;
    if top_p == Some(0.0) {
        let message = "top_p is 0; it must be above 0 (temperature 0 takes the best token)";
        return Err(ApiError::invalid("top_p", message));
    }
    // vLLM's word for all is -1.
    let top_k = body.integer("top_k", -1..=1 << 24)?.map(|k| k.max(0));
    let min_p = body.number("min_p", 0.0..=1.0)?;
    let warped = top_p.is_some_and(|p| p < 1.0)
        || top_k.is_some_and(|k| k > 1)
        || min_p.is_some_and(|p| p > 0.0);
    let usual = defaults.do_sample == Some(true);
    let on = match temperature {
        // Below this the best token is all there is, and scores would overflow.
        Some(t) => t >= 1e-3,
        None => warped || usual,
    };
    Ok(on.then(|| Sampling {
        temperature: temperature.or(defaults.temperature).unwrap_or(1.0) as f32,
        top_k: top_k
            .map(|k| k as usize)
            .or(defaults.top_k)
            .unwrap_or_default(),
        top_p: top_p.or(defaults.top_p).unwrap_or(1.0) as f32,
        min_p: min_p.or(defaults.min_p).unwrap_or(0.0) as f32,
    }))
}

fn repetition_penalty(body: &Fields<'_>) -> ApiResult<Option<f32>> {
    let penalty = body.number("repetition_penalty", 0.0..=10.0)?;
    if penalty == Some(0.0) {
        let message = "repetition_penalty is 0; it must be above 0 (1 for none)";
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    Ok(penalty.map(|p| p as f32))
}

fn stop(body: &Fields<'_>) -> ApiResult<Vec<String>> {
    let strings = match body.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) => {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let Some(strings) = list.iter().map(text).collect() else {
                let message = "stop must be a string or a list of strings";
                return Err(ApiError::invalid("stop", message).code("invalid_type"));
            };
            strings
        }
        Some(_) => {
            let message = "stop must be a string or a list of strings";
            return Err(ApiError::invalid("stop", message).code("invalid_type"));
        }
    };
    let wrong = |s: &String| s.is_empty() || s.len() > MAX_STOP_BYTES;
    if strings.len() > MAX_STOP_STRINGS || strings.iter().any(wrong) {
        let message = format!(
            "stop may hold {MAX_STOP_STRINGS} texts at most, each of 1 to {MAX_STOP_BYTES} bytes"
        );
        return Err(ApiError::invalid("stop", message));
    }
    Ok(strings)
}

fn logprobs(body: &Fields<'_>) -> ApiResult<Option<usize>> {
    let wanted = body.flag("logprobs")?.unwrap_or(false);
    let top = body.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (false, Some(n)) if n > 0 => {
            let message = "top_logprobs needs logprobs to be true";
            Err(ApiError::invalid("top_logprobs", message))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
    }
}

fn format(body: &Fields<'_>) -> ApiResult<ResponseFormat> {
    let Some(value) = body.get("response_format") else {
        return Ok(ResponseFormat::Text);
    };
    let fields = Fields::new(value, "response_format")?;
    match fields.text("type")? {
        Some("text") => Ok(ResponseFormat::Text),
        Some("json_object") => Ok(ResponseFormat::JsonObject),
        Some("json_schema") => {
            let inner = fields.get("json_schema").unwrap_or(&Value::Null);
            let inner = Fields::new(inner, "response_format.json_schema")?;
            match inner.get("schema") {
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                    let strict = inner.flag("strict")?.unwrap_or(false);
                    Ok(ResponseFormat::JsonSchema {
                        schema: schema.clone(),
                        strict,
                    })
                }
                _ => {
                    let param = "response_format.json_schema.schema";
                    let message = format!("{param} must be a JSON schema, as an object");
                    Err(ApiError::invalid(param, message))
                }
            }
        }
        _ => {
            let param = "response_format.type";
            let message = format!("{param} must be text, json_object or json_schema");
            Err(ApiError::invalid(param, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use llava_next_video::config::GenerationConfig;
    use serde_json::{Value, json};

    use super::super::error::ApiResult;
    use super::super::fields::Fields;
    use super::{AnswerBounds, ResponseFormat, Wanted};

    fn read(body: &Value) -> ApiResult<Wanted> {
        let bounds = AnswerBounds {
            max_tokens: 100,
            default_tokens: 50,
            defaults: GenerationConfig::default(),
        };
        Wanted::read(&Fields::new(body, "").expect("an object"), &bounds)
    }

    #[test]
    fn an_answer_is_greedy_until_asked_otherwise() {
        for body in [
            json!({}),
            json!({"temperature": 0}),
            json!({"temperature": 0, "top_p": 0.5}),
            json!({"top_p": 1, "top_k": -1, "min_p": 0}),
            json!({"top_k": 1}),
            json!({"temperature": null, "stop": null, "unknown": {"a": 1}}),
        ] {
            let wanted = read(&body).expect("is read");
            assert_eq!(wanted.options.sampling, None, "{body}");
            assert_eq!(wanted.options.max_new_tokens, Some(50));
        }
        let sampled = json!({"temperature": 0.5, "top_k": 3, "seed": -1, "n": 3, "max_tokens": 7});
        let wanted = read(&sampled).expect("is read");
        let sampling = wanted.options.sampling.expect("draws");
        assert_eq!(
            (sampling.temperature, sampling.top_k, sampling.top_p),
            (0.5, 3, 1.0)
        );
        assert_eq!(wanted.options.num_return_sequences, 3);
        assert_eq!(wanted.options.max_new_tokens, Some(7));
        assert_eq!(wanted.options.seed, u64::MAX);
        let greedy = read(&json!({"n": 3})).expect("is read");
        assert_eq!((greedy.n, greedy.options.num_return_sequences), (3, 1));
    }

    #[test]
    fn wrong_settings_are_named() {
        for (body, place) in [
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": 101}), "max_tokens"),
            (json!({"max_tokens": "9"}), "max_tokens"),
            (
                json!({"max_completion_tokens": 1.5}),
                "max_completion_tokens",
            ),
            (json!({"temperature": -1}), "temperature"),
            (json!({"temperature": 3}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"n": 0}), "n"),
            (json!({"n": 17}), "n"),
            (json!({"stop": ""}), "stop"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stream": 1}), "stream"),
            (json!({"stream_options": []}), "stream_options"),
            (
                json!({"stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
            ),
            (
                json!({"stream_options": {"continuous_usage_stats": "yes"}}),
                "stream_options.continuous_usage_stats",
            ),
            (json!({"top_logprobs": 2}), "top_logprobs"),
            (
                json!({"logprobs": true, "top_logprobs": 21}),
                "top_logprobs",
            ),
            (json!({"tools": [{}]}), "tools"),
            (json!({"presence_penalty": 1}), "presence_penalty"),
            (json!({"logit_bias": {"1": 2}}), "logit_bias"),
            (
                json!({"response_format": {"type": "yaml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"lnv": {"progress": "yes"}}), "lnv.progress"),
        ] {
            let error = read(&body).expect_err(place);
            assert_eq!(error.status, 400, "{body}");
            assert_eq!(error.param.as_deref(), Some(place), "{body}");
        }
    }

    #[test]
    fn formats_are_told_apart() {
        let of = |format: Value| read(&json!({"response_format": format})).map(|w| w.format);
        assert_eq!(of(json!({"type": "text"})), Ok(ResponseFormat::Text));
        assert_eq!(
            of(json!({"type": "json_object"})),
            Ok(ResponseFormat::JsonObject)
        );
        let schema = json!({"type": "object"});
        let format = json!({"type": "json_schema", "json_schema": {
            "name": "x", "schema": schema, "strict": true,
        }});
        assert_eq!(
            of(format),
            Ok(ResponseFormat::JsonSchema {
                schema,
                strict: true
            })
        );
    }
}

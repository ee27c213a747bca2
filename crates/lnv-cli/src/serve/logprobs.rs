//! How likely tokens were, in OpenAI's form.
//!
//! Decision: a token's text is what it adds behind another token, since a decoder drops the blank before a
//! text's first. A token that is only a part of a character has no text of its own; its bytes say what it
//! is where the vocabulary tells them.

use llava_next_video::engine::TokenLogprob;
use llava_next_video::processor::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// OpenAI's stand-in for minus infinity, which JSON cannot say.
const NEVER: f32 = -9999.0;

/// Tokens as OpenAI tells of them.
pub struct Teller<'a> {
    tokenizer: &'a Tokenizer,
    anchor: Vec<u32>,
    before: String,
}

impl<'a> Teller<'a> {
    /// For the tokens of `tokenizer`.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        let anchor = tokenizer.encode("a", false).unwrap_or_default();
        let before = decoded(tokenizer, &anchor);
        Self {
            tokenizer,
            anchor,
            before,
        }
    }

    /// One token with its alternatives.
    pub fn tell(&self, token: &TokenLogprob) -> Value {
        let top = token
            .top
            .iter()
            .map(|(id, logprob)| self.one(*id, *logprob));
        let top: Vec<Value> = top.collect();
        let mut value = self.one(token.id, token.logprob);
        value["top_logprobs"] = json!(top);
        value
    }

    fn one(&self, id: u32, logprob: f32) -> Value {
        let ids = [&self.anchor[..], &[id]].concat();
        let text = decoded(self.tokenizer, &ids);
        let text = text.strip_prefix(&self.before).unwrap_or(&text).to_owned();
        let name = self.tokenizer.id_to_token(id).unwrap_or_default();
        let byte = name
            .strip_prefix("<0x")
            .and_then(|rest| u8::from_str_radix(rest.strip_suffix('>')?, 16).ok());
        let bytes = match byte {
            Some(byte) => Some(vec![byte]),
            None if text.contains('\u{FFFD}') => None,
            None => Some(text.clone().into_bytes()),
        };
        json!({"token": text, "logprob": logprob.max(NEVER), "bytes": bytes})
    }
}

fn decoded(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    // Ids come from the model; one that the tokenizer lacks spells nothing.
    let text = tokenizer.decode(ids, false, Some(false));
    text.unwrap_or_default()
}

/// The field of a choice: null where nothing was asked for.
pub fn field(tokens: Option<Vec<Value>>) -> Value {
    match tokens {
        Some(tokens) => json!({"content": tokens, "refusal": null}),
        None => Value::Null,
    }
}

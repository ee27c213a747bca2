//! Answers that are JSON, or JSON of a certain shape: masks over the tokens that may come next.
//!
//! Decision: `llguidance` compiles schemas and follows answers; it works on bytes, so all that is ours is what bytes a
//! token stands for (read from `tokenizer.json`, because its own bridge would bring a second tokenizer library) and the
//! bounds. White space between values is limited to a space or a line and its indentation, for a small model
//! that may write more of it writes nothing else. `strict` schemas refuse what cannot be kept to; others
//! pass over it.
//!
//! It refuses schemas that are large, that count beyond [`MAX_COUNT`], or that refer to other documents; tokenizers whose
//! tokens cannot spell JSON. A compilation that hangs is left behind on its thread, of which there are
//! [`MAX_COMPILATIONS`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use llava_next_video::engine::{Constraint, Constraints};
use llava_next_video::{Error, Result as LibraryResult};
use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};

use super::media::gate::Gate;

/// Bytes of a schema as text.
const MAX_SCHEMA_BYTES: usize = 64 << 10;

/// What `maxLength`, `minItems` and the like may say.
const MAX_COUNT: u64 = 4096;

/// Characters of a `pattern`.
const MAX_PATTERN: usize = 512;

/// How long one schema may compile.
const COMPILE: Duration = Duration::from_secs(5);

/// Schemas that compile at once.
const MAX_COMPILATIONS: usize = 2;

/// States of one grammar's lexer, a kilobyte or two each.
const MAX_LEXER_STATES: usize = 25_000;

/// Bytes of a token; longer ones take no part.
const MAX_TOKEN_BYTES: usize = 200;

/// Between values: a space, or a new line with its indentation.
const WHITE_SPACE: &str = r" |\n[ ]{0,24}";

/// Why there is no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// The request's fault, in a plain sentence.
    #[error("{0}")]
    Invalid(String),
    /// Too many schemas compile already.
    #[error("too many JSON schemas are being compiled: try again later")]
    Busy,
}

/// Compiles schemas for one tokenizer. Shared by all requests; its methods block.
pub struct JsonGrammars {
    factory: Arc<ParserFactory>,
    gate: Arc<Gate>,
    spells: bool,
}

impl JsonGrammars {
    /// For the tokenizer in the bytes of `tokenizer.json`, of which `ends` are the end-of-sequence ids.
    ///
    /// # Errors
    /// Not a tokenizer, or one that cannot be understood.
    pub fn new(tokenizer: &[u8], ends: &[u32]) -> anyhow::Result<Self> {
        let words = token_bytes(tokenizer, ends)?;
        let spells = br#"{}[]":,0123456789-.truefalsn"#
            .iter()
            .all(|byte| words.iter().any(|word| word == &[*byte]));
        let first = *ends
            .first()
            .ok_or_else(|| anyhow::anyhow!("the model has no end-of-sequence token"))?;
        let size = u32::try_from(words.len())?;
        let trie = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)?;
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        factory.quiet();
        Ok(Self {
            factory: Arc::new(factory),
            gate: Gate::new(MAX_COMPILATIONS),
            spells,
        })
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// See [`SchemaError`].
    pub fn object(&self) -> Result<Arc<dyn Constraints>, SchemaError> {
        self.schema(&json!({ "type": "object" }), true)
    }

    /// What `schema` describes.
    ///
    /// # Errors
    /// See [`SchemaError`].
    pub fn schema(
        &self,
        schema: &Value,
        strict: bool,
    ) -> Result<Arc<dyn Constraints>, SchemaError> {
        if !self.spells {
            return Err(SchemaError::Invalid(
                "this model has no words for JSON's signs, so its answers cannot be JSON: leave response_format out"
                    .into(),
            ));
        }
        let grammar = grammar(schema, strict)?;
        let deadline = Instant::now() + COMPILE;
        let place = self.gate.enter(deadline).ok_or(SchemaError::Busy)?;
        let factory = Arc::clone(&self.factory);
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("schema".into())
            .spawn(move || {
                let matcher = compile(&factory, grammar);
                drop(place);
                // Nobody may be waiting any more.
                let _ = sender.send(matcher);
            })
            .map_err(|_| SchemaError::Busy)?;
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(matcher)) => Ok(Arc::new(Grammar(Mutex::new(matcher)))),
            Ok(Err(cause)) => Err(SchemaError::Invalid(format!(
                "the JSON schema cannot be used: {cause}"
            ))),
            Err(_) => Err(SchemaError::Invalid(
                "the JSON schema takes too long to compile: make it simpler".into(),
            )),
        }
    }
}

fn compile(factory: &ParserFactory, grammar: TopLevelGrammar) -> Result<Matcher, String> {
    // Some schemas that make no sense end in a panic inside.
    let made = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
        factory.create_parser(grammar)
    }));
    let mut matcher = Matcher::new(made);
    match matcher.compute_mask() {
        Ok(_) => Ok(matcher),
        Err(cause) => Err(first_line(&cause.to_string())),
    }
}

/// The library's reason, without what it adds for its developers.
fn first_line(cause: &str) -> String {
    let line = cause.lines().next().unwrap_or_default();
    let line = line
        .strip_prefix("panic: ")
        .map_or(line, |_| "it contradicts itself");
    line.chars()
        .take(300)
        .collect::<String>()
        .trim_end_matches('.')
        .to_owned()
}

/// The grammar of `schema`, once it keeps to the bounds.
fn grammar(schema: &Value, strict: bool) -> Result<TopLevelGrammar, SchemaError> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        _ => {
            let message =
                "the JSON schema must be an object: give it a \"type\" and \"properties\"";
            return Err(SchemaError::Invalid(message.into()));
        }
    };
    let bytes = schema.to_string().len();
    if bytes > MAX_SCHEMA_BYTES {
        return Err(SchemaError::Invalid(format!(
            "the JSON schema has {bytes} bytes, more than {MAX_SCHEMA_BYTES}: make it smaller"
        )));
    }
    check(&schema)?;
    let options = JsonCompileOptions {
        whitespace_flexible: true,
        whitespace_pattern: Some(WHITE_SPACE.into()),
        // As others do: two alternatives that both fit are one too many, but that cannot be seen in advance.
        coerce_one_of: true,
        lenient: !strict,
        ..JsonCompileOptions::default()
    };
    // Also in place of options that the schema itself brings.
    options.apply_to(&mut schema);
    Ok(TopLevelGrammar::from_json_schema(schema))
}

/// Refuses counts and patterns that would make a small schema a large grammar.
fn check(schema: &Value) -> Result<(), SchemaError> {
    const COUNTS: [&str; 6] = [
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
    ];
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                if COUNTS.contains(&name.as_str())
                    && value.as_f64().is_some_and(|count| count > MAX_COUNT as f64)
                {
                    return Err(SchemaError::Invalid(format!(
                        "{name} is {value} in the JSON schema, more than {MAX_COUNT}: use a smaller number"
                    )));
                }
                if name == "pattern" && value.as_str().is_some_and(|text| text.len() > MAX_PATTERN)
                {
                    return Err(SchemaError::Invalid(format!(
                        "a pattern in the JSON schema has more than {MAX_PATTERN} characters: make it shorter"
                    )));
                }
                check(value)?;
            }
            Ok(())
        }
        Value::Array(values) => values.iter().try_for_each(check),
        _ => Ok(()),
    }
}

/// One compiled schema. Its answers share what the lexer learns.
struct Grammar(Mutex<Matcher>);

impl Constraints for Grammar {
    fn begin(&self) -> Box<dyn Constraint> {
        let matcher = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(Answer(matcher.clone()))
    }
}

/// One answer under way.
struct Answer(Matcher);

impl Constraint for Answer {
    fn restrict(&mut self, scores: &mut [f32]) -> LibraryResult<()> {
        let mask = self.0.compute_mask_or_eos().map_err(|cause| {
            Error::Input(format!(
                "the answer cannot go on as the JSON schema asks: {}",
                first_line(&cause.to_string())
            ))
        })?;
        if mask.is_zero() {
            let message =
                "the answer cannot go on as the JSON schema asks: the model has no words for it";
            return Err(Error::Input(message.into()));
        }
        // Words of 32 ids: many are all forbidden.
        for (word, chunk) in scores.chunks_mut(32).enumerate() {
            let allowed = mask.as_slice().get(word).copied().unwrap_or(0);
            if allowed == u32::MAX {
                continue;
            }
            for (bit, score) in chunk.iter_mut().enumerate() {
                if allowed >> bit & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, id: u32) -> LibraryResult<()> {
        // What follows the end is the engine's affair (padding of a batch).
        if self.0.is_stopped() && !self.0.is_error() {
            return Ok(());
        }
        self.0.consume_token(id).map_err(|cause| {
            Error::Input(format!(
                "the answer left what the JSON schema allows: {}",
                first_line(&cause.to_string())
            ))
        })
    }
}

/// How a tokenizer's texts stand for bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spelling {
    /// GPT-2's printable stand-ins.
    ByteLevel,
    /// SentencePiece: a sign for the space, `<0xNN>` for a byte.
    Pieces(char),
    /// Whole words with spaces between.
    Words,
}

/// What bytes each id stands for; empty for those that take no part.
fn token_bytes(tokenizer: &[u8], ends: &[u32]) -> anyhow::Result<Vec<Vec<u8>>> {
    let json: Value = serde_json::from_slice(tokenizer)
        .map_err(|cause| anyhow::anyhow!("tokenizer.json is not valid JSON ({cause})"))?;
    let texts = vocabulary(&json);
    anyhow::ensure!(!texts.is_empty(), "tokenizer.json has no vocabulary");
    let added: Vec<&Value> = json["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let added_id = |token: &Value| token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    let last = texts.iter().map(|(_, id)| *id);
    let last = last.chain(added.iter().filter_map(|token| added_id(token)));
    let last = last.chain(ends.iter().copied()).max().unwrap_or(0);
    anyhow::ensure!(
        last < 1 << 22,
        "tokenizer.json has the id {last}, beyond 4 million"
    );
    let mut words = vec![Vec::new(); last as usize + 1];
    let spelling = spelling(&json);
    let stand_ins = stand_ins();
    for (text, id) in &texts {
        words[*id as usize] = spell(text, spelling, &stand_ins);
    }
    // A byte that also has a token of its own kind is written with that one, as the model learned to.
    let own: std::collections::HashSet<Vec<u8>> = texts
        .iter()
        .filter(|(text, _)| byte_of(text).is_none())
        .map(|(_, id)| words[*id as usize].clone())
        .collect();
    for (text, id) in &texts {
        let word = &mut words[*id as usize];
        let doubled =
            byte_of(text).is_some() && spelling != Spelling::ByteLevel && own.contains(word);
        // The library's mark for special tokens; no text in UTF-8 holds this byte.
        if doubled
            || word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER)
            || word.len() > MAX_TOKEN_BYTES
        {
            word.clear();
        }
    }
    for token in added {
        let (Some(id), Some(text)) = (added_id(token), token["content"].as_str()) else {
            continue;
        };
        let special = token["special"].as_bool() == Some(true) || text.starts_with('<');
        words[id as usize] = match special || text.len() > MAX_TOKEN_BYTES {
            true => special_word(id),
            false => text.into(),
        };
    }
    for id in ends {
        words[*id as usize] = special_word(*id);
    }
    Ok(words)
}

/// A token that no text spells.
fn special_word(id: u32) -> Vec<u8> {
    let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    word.extend(format!("<|{id}|>").bytes());
    word
}

/// Texts and ids of the model's own vocabulary: a map, or a list of texts with their scores.
fn vocabulary(json: &Value) -> Vec<(String, u32)> {
    let vocabulary = &json["model"]["vocab"];
    if let Some(map) = vocabulary.as_object() {
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        return map
            .iter()
            .filter_map(|(text, value)| Some((text.clone(), id(value)?)))
            .collect();
    }
    let list = vocabulary.as_array().into_iter().flatten().enumerate();
    list.filter_map(|(id, entry)| Some((entry[0].as_str()?.to_owned(), u32::try_from(id).ok()?)))
        .collect()
}

fn spelling(json: &Value) -> Spelling {
    let mut parts = Vec::new();
    let mut open = vec![&json["decoder"]];
    while let Some(part) = open.pop() {
        open.extend(part["decoders"].as_array().into_iter().flatten());
        parts.push(part);
    }
    let is = |name: &'static str| move |part: &&&Value| part["type"].as_str() == Some(name);
    if parts.iter().any(|part| is("ByteLevel")(&part)) {
        return Spelling::ByteLevel;
    }
    let replaced = parts
        .iter()
        .find(is("Replace"))
        .filter(|part| part["content"] == " ")
        .and_then(|part| part["pattern"]["String"].as_str());
    let metaspace = parts.iter().find(is("Metaspace"));
    let metaspace = metaspace.map(|part| part["replacement"].as_str().unwrap_or("▁"));
    let space = replaced.or(metaspace).and_then(|text| text.chars().next());
    let bytes = parts.iter().any(|part| is("ByteFallback")(&part));
    match (space, bytes) {
        (Some(space), _) => Spelling::Pieces(space),
        (None, true) => Spelling::Pieces('▁'),
        (None, false) => Spelling::Words,
    }
}

fn spell(text: &str, spelling: Spelling, stand_ins: &HashMap<char, u8>) -> Vec<u8> {
    match spelling {
        // A text with another character never comes out of the model's merges.
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = text.chars().map(|c| stand_ins.get(&c).copied()).collect();
            bytes.unwrap_or_default()
        }
        Spelling::Pieces(space) => match byte_of(text) {
            Some(byte) => vec![byte],
            None => text.replace(space, " ").into_bytes(),
        },
        Spelling::Words => format!(" {text}").into_bytes(),
    }
}

/// The byte of `<0xNN>`.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's characters for bytes: printable ones stand for themselves, the rest follow from U+0100.
fn stand_ins() -> HashMap<char, u8> {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut all = HashMap::new();
    for byte in 0..=255u8 {
        if itself(byte) {
            all.insert(char::from(byte), byte);
        } else if let Some(c) = char::from_u32(next) {
            all.insert(c, byte);
            next += 1;
        }
    }
    all
}

#[cfg(test)]
mod tests;

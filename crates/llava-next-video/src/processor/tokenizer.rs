//! Text to token ids and back: `tokenizer.json` as Transformers' `LlamaTokenizerFast` uses it.
//!
//! Decision: the `tokenizers` crate does the work; this adds what Transformers adds around it: special
//! tokens from `tokenizer_config.json`, a beginning-of-sequence token by `add_bos_token` (which wins
//! over the post-processor in `tokenizer.json` for Llama tokenizers, as in the reference), padding side
//! and pad id, and the clean-up of spaces.
//!
//! [`Detokenizer`] turns a stream of ids into a stream of text that is never taken back.
//!
//! Refuses: checkpoints with `tokenizer.model` only (convert once), files that are not a tokenizer.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::config::CheckpointFiles;
use crate::error::{Error, Result};

/// Where a token's characters begin and end, counted in characters.
pub type CharRange = (usize, usize);

/// On which side of a row padding goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PaddingSide {
    /// Before the tokens: what generation needs.
    #[default]
    Left,
    /// After the tokens: usual in training.
    Right,
}

/// A tokenizer with its special tokens. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    /// Where padding goes (`padding_side`).
    pub padding_side: PaddingSide,
    /// Whether [`Tokenizer::decode`] cleans spaces up where the call does not say.
    pub clean_up_tokenization_spaces: bool,
}

#[derive(Debug)]
struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// `special_tokens_map`: names such as `bos_token` and their texts.
    special_tokens: Map<String, Value>,
    /// Ids that `skip_special_tokens` leaves out.
    special_ids: HashSet<u32>,
    /// Ids of `<0x00>` to `<0xFF>` where the decoder joins them to characters.
    byte_ids: HashSet<u32>,
    /// The decoder turns bytes of several tokens into characters.
    byte_level: bool,
    /// Ids put before and after a text; `None` where `tokenizer.json`'s post-processor decides.
    around: Option<(Vec<u32>, Vec<u32>)>,
}

/// The special tokens that have a name of their own.
const NAMED: [&str; 9] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "image_token",
    "video_token",
];

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// # Errors
    /// A missing or corrupt file.
    pub fn from_files(files: &CheckpointFiles) -> Result<Self> {
        let Some(bytes) = files.read("tokenizer.json")? else {
            return Err(missing(files));
        };
        let config = object(files, "tokenizer_config.json")?;
        let map = object(files, "special_tokens_map.json")?;
        Self::from_parts(&bytes, &config, &map, &files.display("tokenizer.json"))
    }

    /// As [`Tokenizer::from_files`], from the files' contents; `name` stands for `tokenizer.json` in
    /// messages.
    ///
    /// # Errors
    /// A corrupt file.
    pub fn from_parts(
        json: &[u8],
        config: &Map<String, Value>,
        map: &Map<String, Value>,
        name: &str,
    ) -> Result<Self> {
        let corrupt = |cause: &str| {
            Error::Tokenizer(format!(
                "{name} is not a tokenizer that can be read ({cause}): download it again, or save it anew with \
                 Transformers"
            ))
        };
        // The crate unwraps while it reads some broken files.
        let parsed = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(json)));
        let mut tokenizer = match parsed {
            Ok(Ok(tokenizer)) => tokenizer,
            Ok(Err(cause)) => return Err(corrupt(&cause.to_string())),
            Err(_) => return Err(corrupt("its parts contradict each other")),
        };
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|cause| corrupt(&cause.to_string()))?;
        let llama = is_llama(config);
        let special_tokens = special_tokens(config, map, llama, &tokenizer);
        add_missing_tokens(&mut tokenizer, config, &special_tokens);
        let around = llama
            .then(|| around(config, &special_tokens, &tokenizer, name))
            .transpose()?;
        let decoder = serde_json::from_slice::<Value>(json)
            .map(|file| file["decoder"].to_string())
            .unwrap_or_default();
        let byte_ids = if decoder.contains("\"ByteFallback\"") {
            (0..=255_u8)
                .filter_map(|byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>")))
                .collect()
        } else {
            HashSet::new()
        };
        let special_ids = tokenizer
            .get_added_tokens_decoder()
            .iter()
            .filter_map(|(&id, token)| token.special.then_some(id))
            .collect();
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        Ok(Self {
            padding_side: match config.get("padding_side").and_then(Value::as_str) {
                Some("right") => PaddingSide::Right,
                _ => PaddingSide::Left,
            },
            clean_up_tokenization_spaces: flag("clean_up_tokenization_spaces").unwrap_or(false),
            inner: Arc::new(Inner {
                tokenizer,
                special_tokens,
                special_ids,
                byte_ids,
                byte_level: decoder.contains("\"ByteLevel\""),
                around,
            }),
        })
    }

    /// Names and texts of the special tokens (`special_tokens_map`), as chat templates see them.
    pub fn special_tokens_map(&self) -> &Map<String, Value> {
        &self.inner.special_tokens
    }

    /// The text of the special token called `name`, such as `bos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.inner.special_tokens.get(name).and_then(Value::as_str)
    }

    /// The id of a token, by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(token)
    }

    /// The text of a token, by its id, as it stands in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// The id of the special token called `name`.
    pub fn special_token_id(&self, name: &str) -> Option<u32> {
        self.special_token(name)
            .and_then(|token| self.token_to_id(token))
    }

    /// The id that fills rows up. Where the tokenizer names no pad token, the unknown or the
    /// end-of-sequence token serves: padding is masked, so any id does.
    pub fn pad_token_id(&self) -> Option<u32> {
        ["pad_token", "unk_token", "eos_token"]
            .iter()
            .find_map(|name| self.special_token_id(name))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        let tokenizer = &self.inner.tokenizer;
        let added = tokenizer.get_added_tokens_decoder();
        let added = added.keys().max().map_or(0, |&id| id as usize + 1);
        tokenizer.get_vocab_size(false).max(added)
    }

    /// The ids of a text, with beginning- and end-of-sequence tokens where asked for and configured.
    ///
    /// # Errors
    /// The tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encode_with_offsets(text, add_special_tokens)?.0)
    }

    /// As [`Tokenizer::encode`], with the range of characters (not bytes) that each id stands for; empty
    /// for ids that were added.
    ///
    /// # Errors
    /// The tokenizer cannot represent the text.
    pub fn encode_with_offsets(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<CharRange>)> {
        let own = add_special_tokens && self.inner.around.is_none();
        let encoding = self
            .inner
            .tokenizer
            .encode_char_offsets(text, own)
            .map_err(|cause| Error::Tokenizer(format!("the text cannot be tokenized: {cause}")))?;
        let mut ids = encoding.get_ids().to_vec();
        let mut offsets = encoding.get_offsets().to_vec();
        if let (Some((before, after)), true) = (&self.inner.around, add_special_tokens) {
            ids.splice(0..0, before.iter().copied());
            offsets.splice(0..0, before.iter().map(|_| (0, 0)));
            ids.extend(after);
            offsets.extend(after.iter().map(|_| (0, 0)));
        }
        Ok((ids, offsets))
    }

    /// The text of `ids`. Ids outside the vocabulary are left out. `clean_up` of `None` takes the
    /// tokenizer's own setting.
    ///
    /// # Errors
    /// The decoder fails.
    pub fn decode(
        &self,
        ids: &[u32],
        skip_special_tokens: bool,
        clean_up: Option<bool>,
    ) -> Result<String> {
        let text = self.inner.decode(ids, skip_special_tokens)?;
        Ok(if clean_up.unwrap_or(self.clean_up_tokenization_spaces) {
            clean_up_tokenization(&text)
        } else {
            text
        })
    }

    /// [`Tokenizer::decode`] for each row.
    ///
    /// # Errors
    /// The decoder fails.
    pub fn batch_decode(
        &self,
        rows: &[Vec<u32>],
        skip_special_tokens: bool,
        clean_up: Option<bool>,
    ) -> Result<Vec<String>> {
        rows.iter()
            .map(|ids| self.decode(ids, skip_special_tokens, clean_up))
            .collect()
    }

    /// A streaming decoder with the same settings as [`Tokenizer::decode`].
    pub fn detokenizer(&self, skip_special_tokens: bool, clean_up: Option<bool>) -> Detokenizer {
        Detokenizer {
            tokenizer: Arc::clone(&self.inner),
            skip_special_tokens,
            cleaner: clean_up
                .unwrap_or(self.clean_up_tokenization_spaces)
                .then(String::new),
            window: vec![],
            context: 0,
            emitted: 0,
        }
    }
}

impl Inner {
    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map_err(|cause| Error::Tokenizer(format!("the tokens cannot be decoded: {cause}")))
    }
}

/// Removes the spaces that word tokenizers leave (`clean_up_tokenization`).
pub fn clean_up_tokenization(text: &str) -> String {
    const RULES: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    RULES
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Ids in, text out, piece by piece: what was returned never changes, no character is split, and all
/// pieces together equal [`Tokenizer::decode`] of all ids.
///
/// Text is held back only while it may still change: an unfinished character, a run of byte tokens
/// (one wrong byte spoils the whole run), and, with clean-up, the last word.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Inner>,
    skip_special_tokens: bool,
    /// Text waiting to be cleaned up, where that was asked for.
    cleaner: Option<String>,
    /// Ids whose text is not settled, after `context` ids whose text is, kept because a decoder treats
    /// the first token of a text differently.
    window: Vec<u32>,
    context: usize,
    /// Bytes of the window's text that were returned.
    emitted: usize,
}

impl Detokenizer {
    /// Takes one id; returns the text that is settled now, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.is_silent(id) {
            return None;
        }
        self.window.push(id);
        if self.tokenizer.byte_ids.contains(&id) {
            return None;
        }
        let text = self
            .tokenizer
            .decode(&self.window, self.skip_special_tokens)
            .ok()?;
        let settled = if self.tokenizer.byte_level {
            // An unfinished character shows as one replacement character at the end.
            text.strip_suffix('\u{FFFD}').map_or(text.len(), str::len)
        } else {
            text.len()
        };
        let piece = text
            .get(self.emitted..settled)
            .unwrap_or_default()
            .to_owned();
        self.emitted = self.emitted.max(settled);
        if settled == text.len() {
            self.slide();
        }
        self.clean(piece)
    }

    /// Ends the text; returns what was held back, if anything.
    pub fn flush(&mut self) -> Option<String> {
        let text = self
            .tokenizer
            .decode(&self.window, self.skip_special_tokens)
            .unwrap_or_default();
        let rest = text.get(self.emitted..).unwrap_or_default();
        let rest = match self.cleaner.as_mut() {
            Some(pending) => clean_up_tokenization(&(std::mem::take(pending) + rest)),
            None => rest.to_owned(),
        };
        self.window.clear();
        (self.context, self.emitted) = (0, 0);
        Some(rest).filter(|rest| !rest.is_empty())
    }

    /// Ids that decoding leaves out are left out before they can become context.
    fn is_silent(&self, id: u32) -> bool {
        (self.skip_special_tokens && self.tokenizer.special_ids.contains(&id))
            || self.tokenizer.tokenizer.id_to_token(id).is_none()
    }

    /// The ids whose text just settled become the context.
    fn slide(&mut self) {
        self.window.drain(..self.context);
        self.context = self.window.len();
        self.emitted = self
            .tokenizer
            .decode(&self.window, self.skip_special_tokens)
            .map_or(0, |text| text.len());
    }

    fn clean(&mut self, piece: String) -> Option<String> {
        let piece = match self.cleaner.as_mut() {
            None => piece,
            Some(pending) => {
                pending.push_str(&piece);
                let cut = safe_cut(pending);
                let rest = pending.split_off(cut);
                clean_up_tokenization(&std::mem::replace(pending, rest))
            }
        };
        Some(piece).filter(|piece| !piece.is_empty())
    }
}

/// The last place where no clean-up rule can reach across: every rule begins with a space, and the only
/// one with a second space has an apostrophe before it.
fn safe_cut(text: &str) -> usize {
    let bytes = text.as_bytes();
    (1..bytes.len())
        .rev()
        .find(|&at| bytes[at] == b' ' && !matches!(bytes[at - 1], b' ' | b'\''))
        .unwrap_or(0)
}

fn missing(files: &CheckpointFiles) -> Error {
    match files.read("tokenizer.model") {
        Ok(Some(_)) => Error::Tokenizer(format!(
            "{} has tokenizer.model but no tokenizer.json, which is what can be read: convert it once with \
             Transformers, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            files.name()
        )),
        _ => Error::Tokenizer(format!(
            "{} has no tokenizer.json: download it too",
            files.name()
        )),
    }
}

/// A JSON object file of the checkpoint; empty where there is none.
pub(crate) fn object(files: &CheckpointFiles, file: &str) -> Result<Map<String, Value>> {
    match files.read_json(file)? {
        None => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object),
        Some(_) => Err(Error::Config(format!(
            "{} must hold a JSON object: download it again",
            files.display(file)
        ))),
    }
}

/// Tokenizers that Transformers gives a `bos` template whatever their file says.
fn is_llama(config: &Map<String, Value>) -> bool {
    match config.get("tokenizer_class").and_then(Value::as_str) {
        Some(class) => class.contains("Llama"),
        None => config.contains_key("add_bos_token"),
    }
}

/// A token as a string or as `{"content": ...}`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn special_tokens(
    config: &Map<String, Value>,
    map: &Map<String, Value>,
    llama: bool,
    tokenizer: &tokenizers::Tokenizer,
) -> Map<String, Value> {
    let mut tokens = Map::new();
    for name in NAMED {
        let default = match name {
            "bos_token" => Some("<s>"),
            "eos_token" => Some("</s>"),
            "unk_token" => Some("<unk>"),
            _ => None,
        };
        let default = default.filter(|token| llama && tokenizer.token_to_id(token).is_some());
        let text = match config.get(name).or_else(|| map.get(name)) {
            Some(value) => token_text(value),
            None => default,
        };
        if let Some(text) = text {
            tokens.insert(name.into(), text.into());
        }
    }
    let extra = config
        .get("extra_special_tokens")
        .and_then(Value::as_object);
    for (name, value) in extra.into_iter().flatten() {
        if let Some(text) = token_text(value) {
            tokens.insert(name.clone(), text.into());
        }
    }
    let additional = config
        .get("additional_special_tokens")
        .or_else(|| map.get("additional_special_tokens"))
        .and_then(Value::as_array);
    if let Some(list) = additional.filter(|list| !list.is_empty()) {
        let list: Vec<_> = list.iter().filter_map(token_text).collect();
        tokens.insert("additional_special_tokens".into(), list.into());
    }
    tokens
}

/// Adds what `added_tokens_decoder` and the special tokens name and `tokenizer.json` lacks, in the order
/// of their ids.
fn add_missing_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    special: &Map<String, Value>,
) {
    let listed = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    let mut listed: Vec<_> = listed
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse::<u32>().ok()?, token)))
        .collect();
    listed.sort_by_key(|(id, _)| *id);
    let flag =
        |token: &Value, name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
    let mut add: Vec<AddedToken> = listed
        .iter()
        .filter_map(|(_, token)| {
            let mut added = AddedToken::from(token_text(token)?, flag(token, "special"));
            added.lstrip = flag(token, "lstrip");
            added.rstrip = flag(token, "rstrip");
            added.single_word = flag(token, "single_word");
            added.normalized = flag(token, "normalized");
            Some(added)
        })
        .collect();
    let texts = special.values().flat_map(|value| match value {
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
        other => Vec::from_iter(other.as_str()),
    });
    add.extend(texts.map(|text| AddedToken::from(text, true)));
    add.retain(|token| {
        !token.content.is_empty() && tokenizer.token_to_id(&token.content).is_none()
    });
    tokenizer.add_tokens(&add);
}

/// The ids before and after a text, by `add_bos_token` (default true) and `add_eos_token` (false).
fn around(
    config: &Map<String, Value>,
    special: &Map<String, Value>,
    tokenizer: &tokenizers::Tokenizer,
    name: &str,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let ids = |setting: &str, default: bool, token: &str| {
        if !config
            .get(setting)
            .and_then(Value::as_bool)
            .unwrap_or(default)
        {
            return Ok(vec![]);
        }
        let text = special.get(token).and_then(Value::as_str);
        match text.and_then(|text| tokenizer.token_to_id(text)) {
            Some(id) => Ok(vec![id]),
            None => Err(Error::Tokenizer(format!(
                "{setting} is true, but there is no {token} beside {name}: name one in tokenizer_config.json, or \
                 set {setting} to false"
            ))),
        }
    };
    Ok((
        ids("add_bos_token", true, "bos_token")?,
        ids("add_eos_token", false, "eos_token")?,
    ))
}

//! Conversations as Transformers writes them: a list of messages, each a role and a list of parts.
//!
//! ```json
//! [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"},
//!                               {"type": "text", "text": "Why is this funny?"}]}]
//! ```
//!
//! Decision: parsed by hand from JSON, not derived, so that an error says which message and which part
//! is wrong and what to write instead. Extension over Transformers: `content` may be a plain string,
//! which stands for one text part (people come from OpenAI's form; Transformers fails on it later, in
//! the template). Other keys of a message (`name`, `tool_calls`) are kept for the template.
//!
//! Refuses: unknown part types, two sources in one part, more than the limits below.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::config::kind;
use crate::error::{Error, Result};

/// The most conversations in one file.
pub const MAX_CONVERSATIONS: usize = 4096;
/// The most messages in one conversation.
pub const MAX_MESSAGES: usize = 4096;
/// The most parts in one message.
pub const MAX_PARTS: usize = 4096;
/// The most bytes of text in one conversation.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// Sets the scene.
    System,
    /// Asks.
    User,
    /// Answers.
    Assistant,
    /// Another role that a template may know, such as `tool`.
    Other(String),
}

impl Role {
    /// The word of the JSON form.
    pub fn as_str(&self) -> &str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Other(other) => other,
        }
    }
}

impl From<&str> for Role {
    fn from(role: &str) -> Self {
        match role {
            "system" => Self::System,
            "user" => Self::User,
            "assistant" => Self::Assistant,
            other => Self::Other(other.into()),
        }
    }
}

/// Where a picture or a video is to be had. Nothing is opened here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MediaSource {
    /// A file on this machine.
    Path(PathBuf),
    /// `http://` or `https://`.
    Url(String),
    /// The bytes in base64, with or without a `data:...;base64,` prefix.
    Base64(String),
    /// A video given as pictures, in order.
    Frames(Vec<MediaSource>),
}

/// One part of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Words.
    Text(String),
    /// A picture; without a source it is handed over beside the conversation.
    Image(Option<MediaSource>),
    /// A video; without a source it is handed over beside the conversation.
    Video(Option<MediaSource>),
}

/// What one speaker says.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The parts, in the order in which they were written.
    pub content: Vec<Content>,
    /// Other keys of the JSON form, handed to the template as they are.
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of one text part.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self::new(role, vec![Content::Text(text.into())])
    }

    /// A message of `content`.
    pub fn new(role: Role, content: Vec<Content>) -> Self {
        Self {
            role,
            content,
            extra: Map::new(),
        }
    }

    /// The form that chat templates read.
    pub(crate) fn to_template(&self) -> Value {
        let parts = self.content.iter().map(|part| match part {
            Content::Text(text) => json!({"type": "text", "text": text}),
            Content::Image(_) => json!({"type": "image"}),
            Content::Video(_) => json!({"type": "video"}),
        });
        let mut message = Map::new();
        message.insert("role".into(), self.role.as_str().into());
        message.insert("content".into(), parts.collect());
        for (key, value) in &self.extra {
            message.entry(key.clone()).or_insert_with(|| value.clone());
        }
        Value::Object(message)
    }
}

/// A list of messages.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
}

impl Conversation {
    /// Sources of the images, in the order of their placeholders.
    pub fn images(&self) -> impl Iterator<Item = Option<&MediaSource>> {
        self.parts().filter_map(|part| match part {
            Content::Image(source) => Some(source.as_ref()),
            _ => None,
        })
    }

    /// Sources of the videos, in the order of their placeholders.
    pub fn videos(&self) -> impl Iterator<Item = Option<&MediaSource>> {
        self.parts().filter_map(|part| match part {
            Content::Video(source) => Some(source.as_ref()),
            _ => None,
        })
    }

    fn parts(&self) -> impl Iterator<Item = &Content> {
        self.messages.iter().flat_map(|message| &message.content)
    }

    /// The conversation of a JSON list of messages.
    ///
    /// # Errors
    /// Anything that is not the documented form; the sentence names the message and the part.
    pub fn from_json(value: &Value) -> Result<Self> {
        let list = value.as_array().ok_or_else(|| {
            Error::Input(format!(
                "a conversation must be a list of messages such as {EXAMPLE}, but this is {}",
                kind(value)
            ))
        })?;
        if list.is_empty() {
            return Err(Error::Input(
                "the conversation has no messages: write at least one".into(),
            ));
        }
        if list.len() > MAX_MESSAGES {
            return Err(Error::Input(format!(
                "the conversation has {} messages, more than the {MAX_MESSAGES} allowed",
                list.len()
            )));
        }
        let messages = list
            .iter()
            .enumerate()
            .map(|(index, message)| parse_message(message, index))
            .collect::<Result<Vec<_>>>()?;
        let conversation = Self { messages };
        let bytes: usize = conversation
            .parts()
            .map(|part| {
                if let Content::Text(text) = part {
                    text.len()
                } else {
                    0
                }
            })
            .sum();
        if bytes > MAX_TEXT_BYTES {
            return Err(Error::Input(format!(
                "the conversation has {bytes} bytes of text, more than the {MAX_TEXT_BYTES} allowed"
            )));
        }
        Ok(conversation)
    }
}

/// A conversation file: one conversation, or a batch of them.
#[derive(Debug, Clone, PartialEq)]
pub struct ConversationFile {
    /// The conversations, one a row of the batch.
    pub conversations: Vec<Conversation>,
    /// The file held a list of conversations.
    pub batched: bool,
}

impl ConversationFile {
    /// Parses the text of a conversation file.
    ///
    /// # Errors
    /// Not JSON, or not the documented form.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|cause| {
            Error::Input(format!("the conversation is not valid JSON ({cause})"))
        })?;
        Self::from_json(&value)
    }

    /// As [`ConversationFile::parse`], of parsed JSON. A batch is a list whose first element is a list.
    ///
    /// # Errors
    /// As [`Conversation::from_json`].
    pub fn from_json(value: &Value) -> Result<Self> {
        let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
        let batched = list.first().is_some_and(Value::is_array);
        if !batched {
            let conversations = vec![Conversation::from_json(value)?];
            return Ok(Self {
                conversations,
                batched,
            });
        }
        if list.len() > MAX_CONVERSATIONS {
            return Err(Error::Input(format!(
                "the batch has {} conversations, more than the {MAX_CONVERSATIONS} allowed",
                list.len()
            )));
        }
        let conversations = list
            .iter()
            .enumerate()
            .map(|(index, conversation)| {
                Conversation::from_json(conversation)
                    .map_err(|cause| Error::Input(format!("conversation {index}: {cause}")))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            conversations,
            batched,
        })
    }
}

const EXAMPLE: &str = r#"[{"role": "user", "content": [{"type": "text", "text": "..."}]}]"#;

fn parse_message(value: &Value, index: usize) -> Result<Message> {
    let wrong = |what: String| Error::Input(format!("message {index} {what}"));
    let Some(object) = value.as_object() else {
        return Err(wrong(format!(
            "is {}, but must be an object with role and content, as in {EXAMPLE}",
            kind(value)
        )));
    };
    let role = match object.get("role") {
        Some(Value::String(role)) if !role.is_empty() => Role::from(role.as_str()),
        Some(other) => {
            return Err(wrong(format!(
                "has the role {}, but a role is \"system\", \"user\" or \"assistant\"",
                brief(other)
            )));
        }
        None => {
            return Err(wrong(
                "has no role: write \"user\", \"assistant\" or \"system\"".into(),
            ));
        }
    };
    let content = match object.get("content") {
        Some(Value::String(text)) => vec![Content::Text(text.clone())],
        Some(Value::Array(parts)) if parts.len() <= MAX_PARTS => parts
            .iter()
            .enumerate()
            .map(|(part, value)| {
                parse_part(value)
                    .map_err(|cause| wrong(format!("has a wrong content part {part}: {cause}")))
            })
            .collect::<Result<_>>()?,
        Some(Value::Array(parts)) => {
            return Err(wrong(format!(
                "has {} content parts, more than the {MAX_PARTS} allowed",
                parts.len()
            )));
        }
        // A turn that only calls tools says nothing.
        Some(Value::Null) if object.contains_key("tool_calls") => vec![],
        Some(other) => {
            return Err(wrong(format!(
                "has content that is {}, but must be a list such as [{{\"type\": \"text\", \"text\": \"...\"}}]",
                kind(other)
            )));
        }
        None => {
            return Err(wrong(
                "has no content: write a list of text, image and video parts".into(),
            ));
        }
    };
    let mut extra = object.clone();
    extra.retain(|key, _| key != "role" && key != "content");
    Ok(Message {
        role,
        content,
        extra,
    })
}

fn parse_part(value: &Value) -> Result<Content, String> {
    let object = value
        .as_object()
        .ok_or_else(|| format!("it is {}, but must be an object with a type", kind(value)))?;
    match object.get("type").and_then(Value::as_str) {
        Some("text") => match object.get("text") {
            Some(Value::String(text)) => Ok(Content::Text(text.clone())),
            _ => Err("a text part needs \"text\" with a string".into()),
        },
        Some("image") => {
            let source = only_source(object, &["image", "url", "path", "base64"])?;
            let source = source.map(|(key, value)| match value {
                Value::String(text) => classify(key, text),
                other => Err(format!("its {key} is {}, but must be a string", kind(other))),
            });
            Ok(Content::Image(source.transpose()?))
        }
        Some("video") => {
            let source = only_source(object, &["video", "url", "path", "base64"])?;
            Ok(Content::Video(source.map(|(key, value)| video_source(key, value)).transpose()?))
        }
        Some("image_url" | "video_url") => Err(
            "this is OpenAI's form; write {\"type\": \"image\", \"url\": \"...\"} or {\"type\": \"video\", \"url\": \"...\"}"
                .into(),
        ),
        _ => Err(format!(
            "its type is {}, but must be \"text\", \"image\" or \"video\"",
            object.get("type").map_or_else(|| "missing".into(), brief)
        )),
    }
}

/// The one of `keys` that the part has.
fn only_source<'a>(
    object: &'a Map<String, Value>,
    keys: &[&'a str],
) -> Result<Option<(&'a str, &'a Value)>, String> {
    let mut found = keys
        .iter()
        .filter_map(|&key| Some((key, object.get(key).filter(|v| !v.is_null())?)));
    let first = found.next();
    match (first, found.next()) {
        (Some((one, _)), Some((two, _))) => Err(format!("it has both {one} and {two}: keep one")),
        _ => Ok(first),
    }
}

fn video_source(key: &str, value: &Value) -> Result<MediaSource, String> {
    match value {
        Value::String(text) => classify(key, text),
        Value::Array(frames) if !frames.is_empty() => {
            let frames = frames.iter().map(|frame| match frame {
                Value::String(text) => classify(key, text),
                other => Err(format!("a frame is {}, but must be a string", kind(other))),
            });
            Ok(MediaSource::Frames(frames.collect::<Result<_, _>>()?))
        }
        Value::Array(_) => Err(format!(
            "its {key} is an empty list: name at least one frame"
        )),
        other => Err(format!(
            "its {key} is {}, but must be a string or a list of frames",
            kind(other)
        )),
    }
}

/// What a string is: its beginning decides, as in Transformers, whatever its key.
fn classify(key: &str, text: &str) -> Result<MediaSource, String> {
    if text.is_empty() {
        return Err(format!("its {key} is empty"));
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        return Ok(MediaSource::Url(text.into()));
    }
    if text.starts_with("data:") || key == "base64" || (key == "image" && looks_like_base64(text)) {
        return Ok(MediaSource::Base64(text.into()));
    }
    Ok(MediaSource::Path(
        text.strip_prefix("file://").unwrap_or(text).into(),
    ))
}

/// No picture fits into fewer characters, and hardly a path looks like this.
fn looks_like_base64(text: &str) -> bool {
    let base64 =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=' | b'\n' | b'\r');
    text.len() >= 80 && text.bytes().all(base64)
}

fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 40 {
        return text;
    }
    text.chars().take(37).collect::<String>() + "..."
}

//! Messages in OpenAI's form to a conversation and the media that it names.
//!
//! Decision: one reader for all the ways in which people write a picture or a clip (OpenAI, vLLM, SGLang,
//! Transformers), because a client that worked elsewhere should work here. Sources are not touched:
//! whether an address may be read is the media store's decision.
//!
//! Refuses: part types and roles that this model has no use for, parts without a source, two ways of
//! sampling at once, and more media or frames than the server's limits.

use llava_next_video::media::FrameSampling;
use llava_next_video::processor::conversation::{
    Content, Conversation, MAX_MESSAGES, MAX_PARTS, Message, Role,
};
use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::fields::{Fields, kind};
use super::media::{MediaKind, MediaSource};

/// The highest rate of frames that may be asked for; no clip has more.
const MAX_FPS: f64 = 1000.0;

/// The longest clip that times may be given for, in seconds.
const MAX_SECONDS: f64 = 1e6;

/// What a request may ask of media.
#[derive(Debug, Clone, Copy)]
pub struct MediaBounds {
    /// Frames of a clip that says nothing.
    pub default_frames: usize,
    /// Frames of all clips of a request.
    pub max_frames: usize,
    /// Pictures and clips of a request.
    pub max_media: usize,
}

/// A picture or clip that a request names, and where.
#[derive(Debug, Clone)]
pub struct Named {
    /// Its place in the request.
    pub param: String,
    /// What to load.
    pub source: MediaSource,
}

/// Which frames, as far as the request says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    num_frames: Option<i64>,
    fps: Option<f64>,
    start: Option<f64>,
    end: Option<f64>,
}

impl Wish {
    /// The fields of an object.
    pub fn read(fields: &Fields<'_>, bounds: &MediaBounds) -> ApiResult<Self> {
        let most = bounds.max_frames as i64;
        let wish = Self {
            // vLLM's word for all frames is -1.
            num_frames: fields.integer("num_frames", -1..=most)?,
            fps: fields.number("fps", 0.0..=MAX_FPS)?,
            start: fields.number("start", 0.0..=MAX_SECONDS)?,
            end: fields.number("end", 0.0..=MAX_SECONDS)?,
        };
        if wish.num_frames == Some(0) || wish.fps == Some(0.0) {
            let key = if wish.fps.is_some() {
                "fps"
            } else {
                "num_frames"
            };
            let param = fields.at(key);
            let message = format!("{param} is 0; it must be above 0");
            return Err(ApiError::invalid(param, message));
        }
        if wish.num_frames.is_some() && wish.fps.is_some() {
            let param = fields.at("fps");
            let message = "num_frames and fps are two ways of saying which frames: give one";
            return Err(ApiError::invalid(param, message));
        }
        if let (Some(start), Some(end)) = (wish.start, wish.end)
            && start >= end
        {
            let param = fields.at("end");
            let message = format!("{param} is {end}, but must come after start ({start})");
            return Err(ApiError::invalid(param, message));
        }
        Ok(wish)
    }

    /// What is not said is as `other` says.
    fn or(self, other: Self) -> Self {
        let frames = match (self.num_frames, self.fps) {
            (None, None) => other,
            _ => self,
        };
        Self {
            num_frames: frames.num_frames,
            fps: frames.fps,
            start: self.start.or(other.start),
            end: self.end.or(other.end),
        }
    }

    /// The source with this wish.
    pub fn source(self, kind: MediaKind, url: &str, bounds: &MediaBounds) -> MediaSource {
        MediaSource {
            kind,
            url: url.to_owned(),
            sampling: match (self.num_frames, self.fps) {
                (Some(-1), _) => FrameSampling::All,
                (Some(n), _) => FrameSampling::NumFrames(n.unsigned_abs() as usize),
                (None, Some(fps)) => FrameSampling::Fps(fps),
                (None, None) => FrameSampling::Default(bounds.default_frames),
            },
            start: self.start,
            end: self.end,
        }
    }
}

/// What holds for all clips of a request: vLLM's `mm_processor_kwargs` and `media_io_kwargs.video`.
fn common_wish(body: &Fields<'_>, bounds: &MediaBounds) -> ApiResult<Wish> {
    let mut wish = Wish::default();
    if let Some(value) = body.get("mm_processor_kwargs") {
        let fields = Fields::new(value, "mm_processor_kwargs")?;
        wish = Wish::read(&fields, bounds)?;
    }
    if let Some(value) = body.get("media_io_kwargs") {
        let fields = Fields::new(value, "media_io_kwargs")?;
        if let Some(value) = fields.get("video") {
            let fields = Fields::new(value, "media_io_kwargs.video")?;
            wish = Wish::read(&fields, bounds)?.or(wish);
        }
    }
    Ok(wish)
}

/// Reads `messages`.
pub fn messages(body: &Fields<'_>, bounds: &MediaBounds) -> ApiResult<(Conversation, Vec<Named>)> {
    let Some(list) = body.list("messages")? else {
        return Err(ApiError::invalid(
            "messages",
            "messages is missing: send a list such as [{\"role\": \"user\", \"content\": \"...\"}]",
        )
        .code("missing_required_parameter"));
    };
    if list.is_empty() || list.len() > MAX_MESSAGES {
        let message = format!(
            "messages has {} entries; it must have 1 to {MAX_MESSAGES}",
            list.len()
        );
        return Err(ApiError::invalid("messages", message));
    }
    let common = common_wish(body, bounds)?;
    let mut reader = Reader {
        bounds,
        common,
        media: Vec::new(),
    };
    let mut conversation = Conversation::default();
    for (index, value) in list.iter().enumerate() {
        let place = format!("messages[{index}]");
        conversation.messages.push(reader.message(value, &place)?);
    }
    Ok((conversation, reader.media))
}

/// One clip as `/v1/videos/questions` has it: an address, or an object with one.
pub fn video(body: &Fields<'_>, bounds: &MediaBounds) -> ApiResult<Named> {
    let Some(value) = body.get("video") else {
        let message = "video is missing: send {\"url\": \"...\"}";
        return Err(ApiError::invalid("video", message).code("missing_required_parameter"));
    };
    let common = common_wish(body, bounds)?;
    let (url, inner) = address(value, "video", bounds)?;
    Ok(Named {
        param: "video".to_owned(),
        source: inner.or(common).source(MediaKind::Video, url, bounds),
    })
}

struct Reader<'a> {
    bounds: &'a MediaBounds,
    common: Wish,
    media: Vec<Named>,
}

impl Reader<'_> {
    fn message(&mut self, value: &Value, place: &str) -> ApiResult<Message> {
        let fields = Fields::new(value, place)?;
        let param = fields.at("role");
        let role = match fields.text("role")? {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some(other) => {
                let other: String = other.chars().take(40).collect();
                let message = format!(
                    "{param} is \"{other}\"; it must be system, developer, user or assistant (tools \
                     are not called here)"
                );
                return Err(ApiError::invalid(param, message));
            }
            None => {
                let message = format!("{param} is missing: write user, assistant or system");
                return Err(ApiError::invalid(param, message).code("missing_required_parameter"));
            }
        };
        let param = fields.at("content");
        let content = match fields.get("content") {
            Some(Value::String(text)) => vec![Content::Text(text.clone())],
            Some(Value::Array(parts)) if (1..=MAX_PARTS).contains(&parts.len()) => {
                let part =
                    |(index, part): (usize, &Value)| self.part(part, &format!("{param}[{index}]"));
                parts
                    .iter()
                    .enumerate()
                    .map(part)
                    .collect::<ApiResult<_>>()?
            }
            Some(Value::Array(parts)) => {
                let message = format!(
                    "{param} has {} parts; it must have 1 to {MAX_PARTS}",
                    parts.len()
                );
                return Err(ApiError::invalid(param, message));
            }
            Some(other) => {
                let message = format!(
                    "{param} must be a string or a list of parts, but it is {}",
                    kind(other)
                );
                return Err(ApiError::invalid(param, message).code("invalid_type"));
            }
            None => {
                let message = format!("{param} is missing: write what the {} says", role.as_str());
                return Err(ApiError::invalid(param, message).code("missing_required_parameter"));
            }
        };
        Ok(Message::new(role, content))
    }

    fn part(&mut self, value: &Value, place: &str) -> ApiResult<Content> {
        if let Value::String(text) = value {
            return Ok(Content::Text(text.clone()));
        }
        let fields = Fields::new(value, place)?;
        let param = fields.at("type");
        let medium = match fields.text("type")? {
            Some("text" | "input_text") => {
                let param = fields.at("text");
                return match fields.text("text")? {
                    Some(text) => Ok(Content::Text(text.to_owned())),
                    None => {
                        let message = format!("{param} is missing: a text part says something");
                        Err(ApiError::invalid(param, message).code("missing_required_parameter"))
                    }
                };
            }
            Some("image_url" | "input_image" | "image") => MediaKind::Image,
            Some("video_url" | "input_video" | "video") => MediaKind::Video,
            Some(other) => {
                let other: String = other.chars().take(40).collect();
                let message =
                    format!("{param} is \"{other}\"; it must be text, image_url or video_url");
                return Err(ApiError::invalid(param, message));
            }
            None => {
                let message = format!("{param} is missing: write text, image_url or video_url");
                return Err(ApiError::invalid(param, message).code("missing_required_parameter"));
            }
        };
        self.medium(&fields, medium, place)
    }

    /// A picture or a clip, under any of the names that it has elsewhere.
    fn medium(&mut self, fields: &Fields<'_>, kind: MediaKind, place: &str) -> ApiResult<Content> {
        let keys = match kind {
            MediaKind::Image => ["image_url", "input_image", "image", "url"],
            MediaKind::Video => ["video_url", "input_video", "video", "url"],
        };
        let named: Vec<&str> = keys
            .into_iter()
            .filter(|key| fields.get(key).is_some())
            .collect();
        let key = match named[..] {
            [key] => key,
            [] => {
                let param = fields.at(keys[0]);
                let message = format!("{param} is missing: write {{\"url\": \"...\"}}");
                return Err(ApiError::invalid(param, message).code("missing_required_parameter"));
            }
            _ => {
                let message = format!("{place} has both {} and {}: keep one", named[0], named[1]);
                return Err(ApiError::invalid(place, message));
            }
        };
        let param = fields.at(key);
        if self.media.len() == self.bounds.max_media {
            let message = format!(
                "more than {} pictures and clips in one request, which is all that may: send fewer",
                self.bounds.max_media
            );
            return Err(ApiError::invalid(param, message).code("too_many_media"));
        }
        let value = fields.get(key).unwrap_or(&Value::Null);
        let (url, inner) = address(value, &param, self.bounds)?;
        let beside = Wish::read(fields, self.bounds)?;
        let wish = inner.or(beside).or(self.common);
        self.media.push(Named {
            param,
            source: wish.source(kind, url, self.bounds),
        });
        Ok(match kind {
            MediaKind::Image => Content::Image(None),
            MediaKind::Video => Content::Video(None),
        })
    }
}

/// An address: a string, or an object with `url` and what is wished of the frames.
fn address<'a>(value: &'a Value, param: &str, bounds: &MediaBounds) -> ApiResult<(&'a str, Wish)> {
    let (url, wish, param) = match value {
        Value::String(url) => (Some(url.as_str()), Wish::default(), param.to_owned()),
        Value::Object(_) => {
            let fields = Fields::new(value, param)?;
            let wish = Wish::read(&fields, bounds)?;
            (fields.text("url")?, wish, fields.at("url"))
        }
        other => {
            let message = format!(
                "{param} must be a string or an object with url, but it is {}",
                kind(other)
            );
            return Err(ApiError::invalid(param, message).code("invalid_type"));
        }
    };
    match url {
        Some(url) if !url.trim().is_empty() => Ok((url, wish)),
        _ => {
            let message = format!("{param} is missing or empty: give an address or a data URI");
            Err(ApiError::invalid(param, message).code("missing_required_parameter"))
        }
    }
}

#[cfg(test)]
mod tests {
    use llava_next_video::media::FrameSampling;
    use llava_next_video::processor::conversation::{Content, Conversation, Role};
    use serde_json::{Value, json};

    use super::super::error::ApiResult;
    use super::super::fields::Fields;
    use super::super::media::MediaKind;
    use super::{MediaBounds, Named, messages};

    const BOUNDS: MediaBounds = MediaBounds {
        default_frames: 8,
        max_frames: 64,
        max_media: 3,
    };

    fn read(body: &Value) -> ApiResult<(Conversation, Vec<Named>)> {
        messages(&Fields::new(body, "").expect("an object"), &BOUNDS)
    }

    fn user(parts: Value) -> Value {
        json!({"messages": [{"role": "user", "content": parts}]})
    }

    #[test]
    fn every_spelling_of_a_clip_is_the_same_clip() {
        for part in [
            json!({"type": "video_url", "video_url": {"url": "u", "num_frames": 4}}),
            json!({"type": "video_url", "video_url": "u", "num_frames": 4}),
            json!({"type": "video_url", "video_url": {"url": "u"}, "num_frames": 4}),
            json!({"type": "input_video", "video_url": "u", "num_frames": 4}),
            json!({"type": "input_video", "input_video": {"url": "u"}, "num_frames": 4}),
            json!({"type": "video", "video": "u", "num_frames": 4}),
            json!({"type": "video", "url": "u", "num_frames": 4.0}),
        ] {
            let (conversation, media) = read(&user(json!([part]))).expect("is read");
            assert_eq!(media.len(), 1);
            assert_eq!(media[0].source.url, "u");
            assert_eq!(media[0].source.kind, MediaKind::Video);
            assert_eq!(media[0].source.sampling, FrameSampling::NumFrames(4));
            let message = &conversation.messages[0];
            assert_eq!(message.content, [Content::Video(None)]);
            assert_eq!(message.role, Role::User);
        }
        for part in [
            json!({"type": "image_url", "image_url": {"url": "u", "detail": "high"}}),
            json!({"type": "input_image", "image_url": "u"}),
            json!({"type": "image", "image": "u"}),
        ] {
            let (_, media) = read(&user(json!([part]))).expect("is read");
            assert_eq!(media[0].source.kind, MediaKind::Image);
        }
    }

    #[test]
    fn the_nearest_word_on_frames_counts() {
        let clip = json!([{"type": "video_url", "video_url": {"url": "u"}},
                          {"type": "video_url", "video_url": {"url": "u", "fps": 2, "start": 1}}]);
        let mut body = user(clip);
        let (_, media) = read(&body).expect("is read");
        assert_eq!(media[0].source.sampling, FrameSampling::Default(8));
        body["mm_processor_kwargs"] = json!({"num_frames": 16});
        body["media_io_kwargs"] = json!({"video": {"num_frames": 32}});
        let (_, media) = read(&body).expect("is read");
        assert_eq!(media[0].source.sampling, FrameSampling::NumFrames(32));
        assert_eq!(media[1].source.sampling, FrameSampling::Fps(2.0));
        assert_eq!(media[1].source.start, Some(1.0));
        body["media_io_kwargs"] = json!({"video": {"num_frames": -1}});
        let (_, media) = read(&body).expect("is read");
        assert_eq!(media[0].source.sampling, FrameSampling::All);
    }

    #[test]
    fn wrong_messages_are_named() {
        let image = json!({"type": "image_url", "image_url": {"url": "u"}});
        let video = |fields: Value| json!([{"type": "video_url", "video_url": fields}]);
        let rows = [
            (json!({}), "messages"),
            (json!({"messages": "x"}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [1]}), "messages[0]"),
            (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
            (
                json!({"messages": [{"role": "tool", "content": "x"}]}),
                "messages[0].role",
            ),
            (
                json!({"messages": [{"role": "user"}]}),
                "messages[0].content",
            ),
            (user(json!(7)), "messages[0].content"),
            (user(json!([])), "messages[0].content"),
            (user(json!([7])), "messages[0].content[0]"),
            (user(json!([{"text": "x"}])), "messages[0].content[0].type"),
            (
                user(json!([{"type": "input_audio"}])),
                "messages[0].content[0].type",
            ),
            (
                user(json!([{"type": "text"}])),
                "messages[0].content[0].text",
            ),
            (
                user(json!([{"type": "image_url"}])),
                "messages[0].content[0].image_url",
            ),
            (
                user(json!([{"type": "image_url", "image_url": 5}])),
                "messages[0].content[0].image_url",
            ),
            (
                user(json!([{"type": "image", "image": "a", "url": "b"}])),
                "messages[0].content[0]",
            ),
            (
                user(video(json!({"url": ""}))),
                "messages[0].content[0].video_url.url",
            ),
            (
                user(video(json!({"url": "u", "num_frames": 65}))),
                "messages[0].content[0].video_url.num_frames",
            ),
            (
                user(video(json!({"url": "u", "num_frames": 0}))),
                "messages[0].content[0].video_url.num_frames",
            ),
            (
                user(video(json!({"url": "u", "num_frames": 2, "fps": 1}))),
                "messages[0].content[0].video_url.fps",
            ),
            (
                user(video(json!({"url": "u", "start": 2, "end": 1}))),
                "messages[0].content[0].video_url.end",
            ),
            (
                user(json!([image, image, image, image])),
                "messages[0].content[3].image_url",
            ),
        ];
        for (body, place) in rows {
            let error = read(&body).expect_err(place);
            assert_eq!(error.status, 400, "{body}");
            assert_eq!(error.param.as_deref(), Some(place), "{body}");
        }
    }
}

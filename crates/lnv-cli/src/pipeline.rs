//! What the commands share: a checkpoint's files and processor, conversations to inputs, and the report
//! at the end.

use std::io::Read;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ArgMatches;
use indicatif::ProgressBar;
use llava_next_video::config::{CheckpointFiles, GenerationConfig, LlavaNextVideoConfig};
use llava_next_video::engine::{Event, Generation};
use llava_next_video::processor::chat_template::TemplateOptions;
use llava_next_video::processor::conversation::{Content, Conversation, ConversationFile};
use llava_next_video::processor::inputs::{ImageInput, ModelInputs, VideoInput};
use llava_next_video::processor::{LlavaNextVideoProcessor, ModelFacts, ProcessOptions};

use crate::checkpoint;
use crate::media::{LoadedMedia, source};
use crate::output::{self, count};
use crate::progress::{Unit, bar, note};

/// The largest conversation or inputs file; and the most that is taken from a pipe or device, which
/// cannot tell its length and may have no end.
const MAX_FILE_BYTES: u64 = 8 << 30;
const MAX_STREAM_BYTES: u64 = 1 << 30;

/// A checkpoint, read but for its weights.
pub struct Pipeline {
    /// Its files.
    pub files: CheckpointFiles,
    /// Its configuration, with the placeholder ids of its tokenizer.
    pub config: LlavaNextVideoConfig,
    /// Its defaults for generation.
    pub generation: GenerationConfig,
    /// Text and pixels to inputs.
    pub processor: LlavaNextVideoProcessor,
}

impl Pipeline {
    /// Reads configuration, tokenizer and templates of `--model`; `speak` repeats what the files made
    /// worth knowing.
    pub fn open(model: Option<&str>, speak: bool) -> Result<Self> {
        let files = checkpoint::open(model)?;
        let mut config = LlavaNextVideoConfig::read(&files)?;
        let generation = GenerationConfig::read(&files)?;
        let processor = LlavaNextVideoProcessor::from_files(&files, &ModelFacts::from(&config))?;
        if speak {
            processor.notes.iter().for_each(|text| note(text));
            if !generation.not_applied.is_empty() {
                let settings = generation.not_applied.join(", ");
                note(&format!(
                    "generation_config.json: not applied here: {settings}"
                ));
            }
        }
        // Where the two disagree the tokenizer's ids are the ones that a prompt will hold.
        config.image_token_index = processor.image_token_id;
        config.video_token_index = processor.video_token_id;
        Ok(Self {
            files,
            config,
            generation,
            processor,
        })
    }

    /// Conversations and their media to inputs.
    pub fn inputs(
        &self,
        conversations: &[Conversation],
        media: &LoadedMedia,
        add_generation_prompt: bool,
    ) -> Result<ModelInputs> {
        let template = TemplateOptions {
            add_generation_prompt,
            ..TemplateOptions::default()
        };
        let options = ProcessOptions::default();
        let processed = self.processor.apply_chat_template(
            conversations,
            &media.images,
            &media.videos,
            &template,
            &options,
        )?;
        Ok(processed.inputs)
    }
}

impl Pipeline {
    /// Conversations that ask for an answer, and their media, scaled before, to inputs.
    pub fn inputs_scaled(
        &self,
        conversations: &[Conversation],
        images: Vec<ImageInput>,
        videos: Vec<VideoInput>,
    ) -> llava_next_video::error::Result<ModelInputs> {
        let template = TemplateOptions {
            add_generation_prompt: true,
            ..TemplateOptions::default()
        };
        let options = ProcessOptions::default();
        let processed = self.processor.apply_chat_template_scaled(
            conversations,
            images,
            videos,
            &template,
            &options,
        )?;
        Ok(processed.inputs)
    }
}

/// Reads a file of one conversation or a batch.
pub fn read_conversations(path: &std::path::Path) -> Result<ConversationFile> {
    let bytes = read_file(path)?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!(
            "{} is not text in UTF-8: it must hold a conversation as JSON",
            path.display()
        );
    };
    ConversationFile::parse(&text).with_context(|| path.display().to_string())
}

/// Reads a whole file, bounded.
pub fn read_file(path: &std::path::Path) -> Result<Vec<u8>> {
    let failed = |cause| llava_next_video::Error::io("read", path, &cause);
    let file = std::fs::File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let limit = match metadata.is_file() {
        true => MAX_FILE_BYTES,
        false => MAX_STREAM_BYTES,
    };
    let mut bytes = Vec::new();
    if metadata.len() <= limit {
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
    }
    if metadata.len().max(bytes.len() as u64) > limit {
        bail!(
            "{} has more than {} GiB, which is too much to read",
            path.display(),
            limit >> 30
        );
    }
    Ok(bytes)
}

/// A `--video` or `--image` as it was typed.
pub enum NamedMedium {
    /// `--video`.
    Video(String),
    /// `--image`.
    Image(String),
}

/// The media in the order in which they were typed, over both options.
pub fn media_order(matches: &ArgMatches) -> Vec<NamedMedium> {
    let mut media: Vec<(usize, NamedMedium)> = Vec::new();
    let of = |name: &str, make: fn(String) -> NamedMedium| -> Vec<(usize, NamedMedium)> {
        let values = matches.try_get_many::<String>(name).ok().flatten();
        let (Some(values), Some(indices)) = (values, matches.indices_of(name)) else {
            return Vec::new();
        };
        indices.zip(values.map(|v| make(v.clone()))).collect()
    };
    if matches.try_contains_id("video").is_ok() && matches.try_contains_id("image").is_ok() {
        media.extend(of("video", NamedMedium::Video));
        media.extend(of("image", NamedMedium::Image));
    }
    media.sort_by_key(|(index, _)| *index);
    media.into_iter().map(|(_, medium)| medium).collect()
}

/// Refuses media without a name, as an unset variable in a script gives.
pub fn check_named(media: &[NamedMedium]) -> Result<()> {
    for medium in media {
        match medium {
            NamedMedium::Video(text) if text.trim().is_empty() => {
                bail!("--video is empty: give a file or a URL")
            }
            NamedMedium::Image(text) if text.trim().is_empty() => {
                bail!("--image is empty: give a file or a URL")
            }
            _ => {}
        }
    }
    Ok(())
}

/// The parts of a message with these media.
pub fn media_content(media: &[NamedMedium]) -> Vec<Content> {
    let part = |medium: &NamedMedium| match medium {
        NamedMedium::Video(text) => Content::Video(Some(source(text))),
        NamedMedium::Image(text) => Content::Image(Some(source(text))),
    };
    media.iter().map(part).collect()
}

/// Bars for the vision tower and the prefill.
pub struct StageBars {
    bar: Option<(Stage, ProgressBar)>,
}

#[derive(PartialEq)]
enum Stage {
    Vision,
    Prefill,
}

impl StageBars {
    /// No bar yet.
    pub fn new() -> Self {
        Self { bar: None }
    }

    /// Shows an event; a token ends the bars.
    pub fn show(&mut self, event: &Event) -> ControlFlow<()> {
        match event {
            Event::Vision { done, total } => self.set(Stage::Vision, *done, *total),
            Event::Prefill { done, total } => self.set(Stage::Prefill, *done, *total),
            Event::Token { .. } => self.finish(),
        }
        ControlFlow::Continue(())
    }

    /// Removes the bar.
    pub fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn set(&mut self, stage: Stage, done: usize, total: usize) {
        if self.bar.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            self.finish();
            let (unit, what) = match stage {
                Stage::Vision => (Unit::Count, "looking"),
                Stage::Prefill => (Unit::Percent, "reading"),
            };
            self.bar = Some((stage, bar(total as u64, unit, what)));
        }
        if let Some((_, bar)) = &self.bar {
            bar.set_position(done as u64);
        }
    }
}

/// Seconds outside the engine, for the report.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock {
    /// Decoding and preprocessing.
    pub media_s: f64,
    /// Loading the weights.
    pub load_s: f64,
}

/// The line at the end: frames, images, tokens, seconds a stage, tokens a second.
pub fn report((frames, images): (usize, usize), clock: Clock, generation: &Generation) {
    let t = &generation.timings;
    let new: usize = generation.completions.iter().map(|c| c.ids.len()).sum();
    let prompt: usize = generation.prompt_tokens.iter().sum();
    let mut parts = Vec::new();
    if frames > 0 {
        parts.push(count(frames, "frame"));
    }
    if images > 0 {
        parts.push(count(images, "image"));
    }
    let cached = match generation.cached_tokens {
        0 => String::new(),
        n => format!(" ({n} kept)"),
    };
    parts.push(format!("{}{cached}", count(prompt, "prompt token")));
    parts.push(format!("{new} new"));
    let rate = match t.decode_steps {
        0 => String::new(),
        _ => format!(
            " ({:.1} tokens/s)",
            new.saturating_sub(1).max(1) as f64 / t.decode_s
        ),
    };
    output::say(&format!(
        "{} | media {:.2} s, load {:.2} s, vision {:.2} s, prefill {:.2} s, decode {:.2} s{rate}",
        parts.join(", "),
        clock.media_s,
        clock.load_s,
        t.vision_s,
        t.prefill_s,
        t.decode_s,
    ));
}

/// Seconds since `start`.
pub fn seconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}

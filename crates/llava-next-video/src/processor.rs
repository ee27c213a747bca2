//! Conversations, text and pixels to model inputs: Transformers' `LlavaNextVideoProcessor`.
//!
//! ```text
//! Conversation --chat_template--> prompt --tokenizer--> ids --expand--> ids, one a feature vector
//! Image --image_processor--> tiles + AnyResLayout        Video --video_processor--> frames
//! ```
//!
//! Decision: placeholders are expanded after tokenizing, not before. Transformers writes `<image>` 2340
//! times into the text and tokenizes that; repeating the one id gives the same ids, costs nothing, needs no
//! temporary word that user text might contain, and keeps character offsets true. A literal `<image>` in a
//! user's text is a placeholder, as in the reference. Each video's length comes from its own frames and the
//! model's pooling, where the reference takes the first video's and always divides by 4.
//!
//! Refuses, in one sentence with both numbers: more or fewer media than placeholders, media that the
//! model's vision tower could not take, rows of different lengths without padding, and a truncation that
//! would cut a placeholder.

pub mod anyres;
pub mod arriving;
pub mod chat_template;
pub mod conversation;
mod facts;
pub mod image_processor;
pub mod inputs;
mod load;
pub mod resize;
pub mod settings;
pub mod tensors;
pub mod tokenizer;
pub mod video_processor;

use std::ops::Range;

use crate::error::{Error, Result};
use crate::media::{Image, ImageSize, Video};
use chat_template::{ChatTemplates, Rendered, TemplateOptions};
use conversation::{Conversation, Message};
use image_processor::LlavaNextImageProcessor;
use inputs::{ImageInput, ModelInputs, VideoInput};
use tokenizer::{Detokenizer, PaddingSide, Tokenizer};
use video_processor::{FrameScaler, LlavaNextVideoVideoProcessor};

pub use facts::ModelFacts;

/// Image processor, video processor, tokenizer and chat template in one.
#[derive(Debug, Clone)]
pub struct LlavaNextVideoProcessor {
    /// For images.
    pub image_processor: LlavaNextImageProcessor,
    /// For videos.
    pub video_processor: LlavaNextVideoVideoProcessor,
    /// For text.
    pub tokenizer: Tokenizer,
    /// For conversations.
    pub chat_template: ChatTemplates,
    /// The ViT's patch in pixels.
    pub patch_size: usize,
    /// `default` or `full`.
    pub vision_feature_select_strategy: String,
    /// Feature vectors that the vision tower adds to the patches (1 for CLIP's CLS).
    pub num_additional_image_tokens: usize,
    /// The placeholder of an image in text.
    pub image_token: String,
    /// Its id.
    pub image_token_id: u32,
    /// The placeholder of a video in text.
    pub video_token: String,
    /// Its id.
    pub video_token_id: u32,
    /// What a person should know about how the files were read, one sentence each.
    pub notes: Vec<String>,
    facts: ModelFacts,
}

/// How rows are brought to one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Padding {
    /// To the longest row (`padding=True`).
    #[default]
    Longest,
    /// To this many tokens (`padding="max_length"`); longer rows stay.
    MaxLength(usize),
    /// Not at all: rows must have one length (`padding=False`).
    No,
}

/// What [`LlavaNextVideoProcessor::process`] takes besides text and media.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessOptions {
    /// How rows are brought to one length.
    pub padding: Padding,
    /// On which side; `None` is the tokenizer's own.
    pub padding_side: Option<PaddingSide>,
    /// Cut rows after this many tokens (`truncation=True, max_length=n`).
    pub truncate: Option<usize>,
    /// Let the tokenizer add its beginning-of-sequence token.
    pub add_special_tokens: bool,
}

impl Default for ProcessOptions {
    fn default() -> Self {
        Self {
            padding: Padding::Longest,
            padding_side: None,
            truncate: None,
            add_special_tokens: true,
        }
    }
}

/// What [`LlavaNextVideoProcessor::apply_chat_template`] returns.
#[derive(Debug, Clone, PartialEq)]
pub struct Processed {
    /// For the model.
    pub inputs: ModelInputs,
    /// The prompt of each conversation, before placeholders are expanded.
    pub rendered: Vec<String>,
    /// `[B][S]`, true where the assistant speaks, where that was asked for (`assistant_masks`).
    pub assistant_masks: Option<Vec<Vec<bool>>>,
}

/// Conversations as text.
struct Prompts {
    texts: Vec<String>,
    /// Where the assistant speaks.
    spans: Vec<Vec<Range<usize>>>,
    /// As asked for, but fit for these texts.
    options: ProcessOptions,
}

/// A text's ids and where in it each of them is.
type Encoded = (Vec<u32>, Vec<tokenizer::CharRange>);

/// A tokenized row and how many of its ids each original id became.
struct Row {
    ids: Vec<u32>,
    assistant: Vec<bool>,
}

impl LlavaNextVideoProcessor {
    /// The prompt of one conversation (`apply_chat_template(..., tokenize=False)`).
    ///
    /// # Errors
    /// As [`chat_template::ChatTemplate::render`].
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> Result<String> {
        let options = TemplateOptions {
            add_generation_prompt,
            continue_final_message,
            ..TemplateOptions::default()
        };
        Ok(self.render_with(messages, &options)?.text)
    }

    /// As [`LlavaNextVideoProcessor::render`], with all options.
    ///
    /// # Errors
    /// As [`chat_template::ChatTemplate::render`].
    pub fn render_with(&self, messages: &[Message], options: &TemplateOptions) -> Result<Rendered> {
        let template = self.chat_template.get(options.template.as_deref())?;
        template.render(messages, self.tokenizer.special_tokens_map(), options)
    }

    /// Texts and media to model inputs (`__call__`). Media are matched with placeholders in order over
    /// all texts.
    ///
    /// # Errors
    /// Counts that do not match, media that the model cannot take, rows that cannot be batched.
    pub fn process(
        &self,
        texts: &[String],
        images: &[Image],
        videos: &[Video],
        options: &ProcessOptions,
    ) -> Result<ModelInputs> {
        let spans = vec![vec![]; texts.len()];
        Ok(self
            .process_spans(texts, &spans, images, videos, options)?
            .0)
    }

    /// Renders conversations and processes them with their media, already loaded, in order over all
    /// conversations (`apply_chat_template(..., tokenize=True, return_dict=True)`). A prompt that begins
    /// with the beginning-of-sequence token does not get a second one.
    ///
    /// # Errors
    /// As [`LlavaNextVideoProcessor::render_with`] and [`LlavaNextVideoProcessor::process`].
    pub fn apply_chat_template(
        &self,
        conversations: &[Conversation],
        images: &[Image],
        videos: &[Video],
        template: &TemplateOptions,
        options: &ProcessOptions,
    ) -> Result<Processed> {
        let Prompts {
            texts,
            spans,
            options,
        } = self.rendered(conversations, template, options)?;
        let rows = self.process_spans(&texts, &spans, images, videos, &options)?;
        Ok(processed(texts, rows, template))
    }

    /// The same with media that were scaled before, by [`LlavaNextVideoProcessor::scale_image`] and
    /// [`LlavaNextVideoProcessor::scale_video`]: whoever has little memory scales one after another and
    /// keeps none of the decoded ones. Pixels are shared, so the same medium in two places costs nothing.
    ///
    /// # Errors
    /// As [`LlavaNextVideoProcessor::apply_chat_template`].
    pub fn apply_chat_template_scaled(
        &self,
        conversations: &[Conversation],
        images: Vec<ImageInput>,
        videos: Vec<VideoInput>,
        template: &TemplateOptions,
        options: &ProcessOptions,
    ) -> Result<Processed> {
        let Prompts {
            texts,
            spans,
            options,
        } = self.rendered(conversations, template, options)?;
        let counts = (images.len(), videos.len());
        let encoded = self.encode_all(&texts, counts, &options)?;
        let rows = self.rows(encoded, &spans, images, videos, &options)?;
        Ok(processed(texts, rows, template))
    }

    /// One image as the model takes it.
    ///
    /// # Errors
    /// An image that the model cannot take.
    pub fn scale_image(&self, image: &Image) -> Result<ImageInput> {
        let image = std::slice::from_ref(image);
        self.check_sizes(image, &[])?;
        let mut scaled = self.scale_images(image)?;
        scaled
            .pop()
            .ok_or_else(|| Error::Input("an image became nothing".into()))
    }

    /// One video as the model takes it.
    ///
    /// # Errors
    /// A video that the model cannot take, or one without frames.
    pub fn scale_video(&self, video: &Video) -> Result<VideoInput> {
        let video = std::slice::from_ref(video);
        self.check_sizes(&[], video)?;
        let mut scaled = self.video_processor.preprocess(video)?;
        scaled
            .pop()
            .ok_or_else(|| Error::Input("a video became nothing".into()))
    }

    /// For the frames of one video, of `size`, that are scaled one by one as they are decoded: each becomes what
    /// it becomes in [`LlavaNextVideoProcessor::scale_video`].
    ///
    /// # Errors
    /// Frames that the model cannot take.
    pub fn frame_scaler(&self, size: ImageSize) -> Result<FrameScaler> {
        let scaler = self.video_processor.frame_scaler(size)?;
        self.facts.check_pixels("video", scaler.size())?;
        Ok(scaler)
    }

    /// The text of ids (`decode`).
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode(
        &self,
        ids: &[u32],
        skip_special_tokens: bool,
        clean_up: Option<bool>,
    ) -> Result<String> {
        self.tokenizer.decode(ids, skip_special_tokens, clean_up)
    }

    /// The text of each row (`batch_decode`).
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn batch_decode(
        &self,
        rows: &[Vec<u32>],
        skip_special_tokens: bool,
        clean_up: Option<bool>,
    ) -> Result<Vec<String>> {
        self.tokenizer
            .batch_decode(rows, skip_special_tokens, clean_up)
    }

    /// `batch_decode` without special tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn post_process_image_text_to_text(&self, rows: &[Vec<u32>]) -> Result<Vec<String>> {
        self.batch_decode(rows, true, None)
    }

    /// A streaming decoder.
    pub fn detokenizer(&self, skip_special_tokens: bool) -> Detokenizer {
        self.tokenizer.detokenizer(skip_special_tokens, None)
    }

    /// Names of the tensors that tokenizer and image processor make.
    pub fn model_input_names(&self) -> [&'static str; 4] {
        ["input_ids", "attention_mask", "pixel_values", "image_sizes"]
    }

    /// What the processor knows of the model.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// Placeholder ids of one image: its features, by the reference's formula.
    pub fn image_tokens(&self, image: &ImageInput) -> usize {
        let dropped = usize::from(self.vision_feature_select_strategy == "default");
        (image.layout.feature_tokens() + self.num_additional_image_tokens).saturating_sub(dropped)
    }

    /// The prompts of conversations.
    fn rendered(
        &self,
        conversations: &[Conversation],
        template: &TemplateOptions,
        options: &ProcessOptions,
    ) -> Result<Prompts> {
        let mut texts = Vec::with_capacity(conversations.len());
        let mut spans = Vec::with_capacity(conversations.len());
        for conversation in conversations {
            let rendered = self.render_with(&conversation.messages, template)?;
            texts.push(rendered.text);
            spans.push(rendered.assistant_spans);
        }
        let bos = self.tokenizer.special_token("bos_token");
        let has_bos =
            |text: &String| bos.is_some_and(|bos| !bos.is_empty() && text.starts_with(bos));
        let options = ProcessOptions {
            add_special_tokens: options.add_special_tokens && !texts.first().is_some_and(has_bos),
            ..options.clone()
        };
        Ok(Prompts {
            texts,
            spans,
            options,
        })
    }

    fn process_spans(
        &self,
        texts: &[String],
        spans: &[Vec<Range<usize>>],
        images: &[Image],
        videos: &[Video],
        options: &ProcessOptions,
    ) -> Result<(ModelInputs, Vec<Vec<bool>>)> {
        let encoded = self.encode_all(texts, (images.len(), videos.len()), options)?;
        self.check_sizes(images, videos)?;
        let images = self.scale_images(images)?;
        let videos = self.video_processor.preprocess(videos)?;
        self.rows(encoded, spans, images, videos, options)
    }

    fn scale_images(&self, images: &[Image]) -> Result<Vec<ImageInput>> {
        let images = self.image_processor.preprocess(images, self.patch_size)?;
        // Without a crop the size of a tile depends on the image.
        for image in &images {
            self.facts.check_pixels("image", image.tiles.size)?;
        }
        Ok(images)
    }

    /// The ids of all texts, whose placeholders are as many as there are media.
    fn encode_all(
        &self,
        texts: &[String],
        (images, videos): (usize, usize),
        options: &ProcessOptions,
    ) -> Result<Vec<Encoded>> {
        if texts.is_empty() {
            return Err(Error::Input(
                "there is no text to process: give at least one".into(),
            ));
        }
        let encoded = texts
            .iter()
            .map(|text| self.encode_checked(text, options.add_special_tokens))
            .collect::<Result<Vec<_>>>()?;
        let count = |id: u32| {
            encoded
                .iter()
                .flat_map(|(ids, _)| ids)
                .filter(|&&i| i == id)
                .count()
        };
        check_count(
            "image",
            &self.image_token,
            count(self.image_token_id),
            images,
        )?;
        check_count(
            "video",
            &self.video_token,
            count(self.video_token_id),
            videos,
        )?;
        Ok(encoded)
    }

    /// Rows of one length, with their placeholders expanded, and their media.
    fn rows(
        &self,
        encoded: Vec<Encoded>,
        spans: &[Vec<Range<usize>>],
        images: Vec<ImageInput>,
        videos: Vec<VideoInput>,
        options: &ProcessOptions,
    ) -> Result<(ModelInputs, Vec<Vec<bool>>)> {
        let lengths = self.placeholder_lengths(&images, &videos)?;
        let mut lengths = (lengths.0.into_iter(), lengths.1.into_iter());
        let mut rows: Vec<_> = encoded
            .into_iter()
            .zip(spans)
            .map(|((ids, offsets), spans)| self.expand(&ids, &offsets, spans, &mut lengths))
            .collect();
        if let Some(limit) = options.truncate {
            for (index, row) in rows.iter_mut().enumerate() {
                self.truncate(row, limit, index)?;
            }
        }
        let side = options.padding_side.unwrap_or(self.tokenizer.padding_side);
        let pad_id = self.tokenizer.pad_token_id().unwrap_or(0);
        let (input_ids, attention_mask, masks) = pad(rows, options.padding, side, pad_id)?;
        let inputs = ModelInputs {
            input_ids,
            attention_mask,
            images,
            videos,
        };
        Ok((inputs, masks))
    }

    /// Checks, before any pixel is computed, that the model can take what the settings will make.
    fn check_sizes(&self, images: &[Image], videos: &[Video]) -> Result<()> {
        for image in images {
            let layout = self.image_processor.layout(image.size, self.patch_size)?;
            let settings = &self.image_processor.settings;
            let tile = settings.output_size().unwrap_or(settings.crop_size);
            self.facts.check_layout(&layout, tile)?;
        }
        for frame in videos.iter().filter_map(|video| video.frames.first()) {
            self.frame_scaler(frame.size)?;
        }
        Ok(())
    }

    /// Encodes a text and checks that its placeholders became placeholder ids.
    fn encode_checked(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        let (ids, offsets) = self
            .tokenizer
            .encode_with_offsets(text, add_special_tokens)?;
        let kinds = [
            (&self.image_token, self.image_token_id),
            (&self.video_token, self.video_token_id),
        ];
        for (token, id) in kinds {
            let written = text.matches(token.as_str()).count();
            let found = ids.iter().filter(|&&i| i == id).count();
            if written != found {
                return Err(Error::Tokenizer(format!(
                    "the text has {written} x {token}, but the tokenizer makes {found} x id {id} of it: add {token} to \
                     tokenizer.json as a special token with this id"
                )));
            }
        }
        Ok((ids, offsets))
    }

    /// How many ids each image's and each video's placeholder becomes.
    fn placeholder_lengths(
        &self,
        images: &[ImageInput],
        videos: &[VideoInput],
    ) -> Result<(Vec<usize>, Vec<usize>)> {
        let images = images
            .iter()
            .map(|image| self.image_tokens(image))
            .collect();
        if videos.is_empty() {
            return Ok((images, vec![]));
        }
        let frame = self.facts.tokens_per_frame()?;
        let videos = videos
            .iter()
            .map(|video| video.frames.count * frame)
            .collect();
        Ok((images, videos))
    }

    /// Repeats each placeholder id once a feature vector; without media it stays a single id.
    fn expand(
        &self,
        ids: &[u32],
        offsets: &[tokenizer::CharRange],
        spans: &[Range<usize>],
        lengths: &mut (std::vec::IntoIter<usize>, std::vec::IntoIter<usize>),
    ) -> Row {
        let mut row = Row {
            ids: Vec::with_capacity(ids.len()),
            assistant: vec![],
        };
        for (&id, &(start, end)) in ids.iter().zip(offsets) {
            let copies = if id == self.image_token_id {
                lengths.0.next().unwrap_or(1)
            } else if id == self.video_token_id {
                lengths.1.next().unwrap_or(1)
            } else {
                1
            };
            let spoken = spans
                .iter()
                .any(|span| start < span.end && end > span.start);
            row.ids.extend(std::iter::repeat_n(id, copies));
            row.assistant.extend(std::iter::repeat_n(spoken, copies));
        }
        row
    }

    fn truncate(&self, row: &mut Row, limit: usize, index: usize) -> Result<()> {
        let Some(cut) = row.ids.get(limit..) else {
            return Ok(());
        };
        for (token, id) in [
            (&self.image_token, self.image_token_id),
            (&self.video_token, self.video_token_id),
        ] {
            let lost = cut.iter().filter(|&&i| i == id).count();
            if lost > 0 {
                return Err(Error::Input(format!(
                    "cutting row {index} of {} tokens to {limit} would lose {lost} of its {token} placeholders: allow \
                     more tokens, or do not truncate",
                    row.ids.len()
                )));
            }
        }
        row.ids.truncate(limit);
        row.assistant.truncate(limit);
        Ok(())
    }
}

/// Prompts as they were rendered, and what became of them.
fn processed(
    rendered: Vec<String>,
    (inputs, masks): (ModelInputs, Vec<Vec<bool>>),
    template: &TemplateOptions,
) -> Processed {
    Processed {
        inputs,
        rendered,
        assistant_masks: template.return_assistant_spans.then_some(masks),
    }
}

/// Media without placeholders or placeholders without media.
fn check_count(what: &str, token: &str, placeholders: usize, given: usize) -> Result<()> {
    if placeholders == given {
        return Ok(());
    }
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    Err(Error::Input(format!(
        "the text has {} ({token}), but {} given: give one {what} for each",
        plural(placeholders, &format!("{what} placeholder")),
        match given {
            1 => format!("1 {what} was"),
            n => format!("{n} {what}s were"),
        }
    )))
}

type Padded = (Vec<Vec<u32>>, Vec<Vec<bool>>, Vec<Vec<bool>>);

/// Ids, attention mask and assistant mask of rows brought to one length.
fn pad(rows: Vec<Row>, padding: Padding, side: PaddingSide, pad_id: u32) -> Result<Padded> {
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
    let target = match padding {
        Padding::MaxLength(length) => length.max(longest),
        Padding::Longest | Padding::No => longest,
    };
    if padding == Padding::No && rows.iter().any(|row| row.ids.len() != longest) {
        return Err(Error::Input(
            "the rows have different lengths and padding is off: turn padding on, or process them one by one".into(),
        ));
    }
    let (mut ids, mut mask, mut assistant) = (vec![], vec![], vec![]);
    for row in rows {
        let real = row.ids.len();
        ids.push(fill(row.ids, target, pad_id, side));
        mask.push(fill(vec![true; real], target, false, side));
        assistant.push(fill(row.assistant, target, false, side));
    }
    Ok((ids, mask, assistant))
}

fn fill<T: Copy>(mut row: Vec<T>, target: usize, with: T, side: PaddingSide) -> Vec<T> {
    let missing = target.saturating_sub(row.len());
    match side {
        PaddingSide::Right => row.resize(row.len() + missing, with),
        PaddingSide::Left => {
            row.splice(0..0, std::iter::repeat_n(with, missing));
        }
    }
    row
}

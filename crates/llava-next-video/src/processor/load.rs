//! A processor from the files of a checkpoint.
//!
//! Decision: what the files leave out is taken from the model, with a note: the documentation page asks for
//! just that (`patch_size`, `num_additional_image_tokens`, `vision_feature_select_strategy`), and the default
//! that Transformers takes for the second (0) is one token short for CLIP.
//!
//! Refuses: settings of the wrong kind. Settings that merely do not fit the model are refused when they are used,
//! so that text can be processed without them.

use serde_json::{Map, Value};

use super::chat_template::ChatTemplates;
use super::image_processor::LlavaNextImageProcessor;
use super::resize::Arithmetic;
use super::settings::Fields;
use super::tokenizer::{Tokenizer, object};
use super::video_processor::LlavaNextVideoVideoProcessor;
use super::{LlavaNextVideoProcessor, ModelFacts};
use crate::config::CheckpointFiles;
use crate::error::Result;

impl LlavaNextVideoProcessor {
    /// Reads a checkpoint's processor files: `processor_config.json` (also the form of Transformers 5,
    /// which holds the image and the video processor), `preprocessor_config.json`,
    /// `video_preprocessor_config.json`, the tokenizer's and the chat template's files. What they leave out
    /// is taken from the model, with a note.
    ///
    /// # Errors
    /// A file that cannot be read or used.
    pub fn from_files(files: &CheckpointFiles, facts: &ModelFacts) -> Result<Self> {
        let config = object(files, "processor_config.json")?;
        let mut notes = Vec::new();
        let tokenizer = Tokenizer::from_files(files)?;
        let chat_template = ChatTemplates::from_files(files, &tokenizer, &facts.text_model_type)?;
        notes.extend(chat_template.note.clone());
        let token = |key: &str, default: &str| {
            let text = tokenizer
                .special_token(key)
                .or_else(|| config.get(key).and_then(Value::as_str));
            text.filter(|text| !text.is_empty())
                .unwrap_or(default)
                .to_owned()
        };
        let (image_token, video_token) = (
            token("image_token", "<image>"),
            token("video_token", "<video>"),
        );
        let name = files.display("processor_config.json");
        let fields = Fields {
            settings: &config,
            file: &name,
        };
        let patch_size = match fields.get("patch_size") {
            Some(value) => fields.whole("patch_size", value)?,
            None => facts.patch_size,
        };
        Ok(Self {
            image_processor: image_processor(files, &config, facts, &mut notes)?,
            video_processor: video_processor(files, &config, facts)?,
            patch_size,
            vision_feature_select_strategy: strategy(&fields, facts)?,
            num_additional_image_tokens: additional_tokens(&fields, facts, &mut notes)?,
            image_token_id: token_id(&tokenizer, &image_token, facts.image_token_id, &mut notes),
            video_token_id: token_id(&tokenizer, &video_token, facts.video_token_id, &mut notes),
            image_token,
            video_token,
            tokenizer,
            chat_template,
            notes,
            facts: facts.clone(),
        })
    }
}

/// The object under `key` of Transformers 5's `processor_config.json`.
fn nested<'a>(config: &'a Map<String, Value>, key: &str) -> Option<&'a Map<String, Value>> {
    config.get(key).and_then(Value::as_object)
}

fn image_processor(
    files: &CheckpointFiles,
    config: &Map<String, Value>,
    facts: &ModelFacts,
    notes: &mut Vec<String>,
) -> Result<LlavaNextImageProcessor> {
    let arithmetic = Arithmetic::Pillow;
    if let Some(settings) = nested(config, "image_processor") {
        let name = files.display("processor_config.json");
        return LlavaNextImageProcessor::from_json(settings, arithmetic, &name);
    }
    let settings = object(files, "preprocessor_config.json")?;
    if settings.is_empty() {
        notes.push(format!(
            "{} has no preprocessor_config.json; the image processor's settings are taken from the model",
            files.name()
        ));
        return Ok(facts.image_processor(arithmetic));
    }
    LlavaNextImageProcessor::from_json(
        &settings,
        arithmetic,
        &files.display("preprocessor_config.json"),
    )
}

fn video_processor(
    files: &CheckpointFiles,
    config: &Map<String, Value>,
    facts: &ModelFacts,
) -> Result<LlavaNextVideoVideoProcessor> {
    let arithmetic = Arithmetic::Torchvision;
    if let Some(settings) = nested(config, "video_processor") {
        let name = files.display("processor_config.json");
        return LlavaNextVideoVideoProcessor::from_json(settings, arithmetic, &name);
    }
    for file in ["video_preprocessor_config.json", "preprocessor_config.json"] {
        let settings = object(files, file)?;
        if !settings.is_empty() {
            return LlavaNextVideoVideoProcessor::from_json(
                &settings,
                arithmetic,
                &files.display(file),
            );
        }
    }
    // Transformers 5 may write the image processor only.
    if let Some(settings) = nested(config, "image_processor") {
        let name = files.display("processor_config.json");
        return LlavaNextVideoVideoProcessor::from_json(settings, arithmetic, &name);
    }
    Ok(LlavaNextVideoVideoProcessor {
        settings: facts.settings(arithmetic),
        ..LlavaNextVideoVideoProcessor::class_default(arithmetic)
    })
}

fn strategy(fields: &Fields<'_>, facts: &ModelFacts) -> Result<String> {
    match fields.get("vision_feature_select_strategy") {
        None => Ok(facts.vision_feature_select_strategy.clone()),
        Some(Value::String(strategy)) if strategy == "default" || strategy == "full" => {
            Ok(strategy.clone())
        }
        Some(value) => Err(fields.wrong(
            "vision_feature_select_strategy",
            value,
            "\"default\" or \"full\"",
        )),
    }
}

fn additional_tokens(
    fields: &Fields<'_>,
    facts: &ModelFacts,
    notes: &mut Vec<String>,
) -> Result<usize> {
    let fitting = usize::from(facts.has_cls);
    let Some(value) = fields.get("num_additional_image_tokens") else {
        return Ok(fitting);
    };
    let number = value.as_u64().filter(|n| *n <= 1 << 16).ok_or_else(|| {
        fields.wrong("num_additional_image_tokens", value, "a small whole number")
    })?;
    if number as usize != fitting {
        notes.push(format!(
            "{} says num_additional_image_tokens {number}, but this vision tower adds {fitting}: images will get a wrong \
             number of placeholders, set it to {fitting}",
            fields.file
        ));
    }
    Ok(number as usize)
}

/// The id of a placeholder: the tokenizer's, or the configuration's where the tokenizer has no such token.
fn token_id(tokenizer: &Tokenizer, token: &str, configured: u32, notes: &mut Vec<String>) -> u32 {
    match tokenizer.token_to_id(token) {
        Some(id) => {
            if id != configured {
                notes.push(format!(
                    "the tokenizer gives {token} the id {id}, config.json {configured}; the tokenizer's is used"
                ));
            }
            id
        }
        None => {
            notes.push(format!(
                "the tokenizer has no token {token}: text cannot refer to such media"
            ));
            configured
        }
    }
}

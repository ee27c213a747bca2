//! `lnv generate`: a conversation file or processed inputs, perhaps a whole batch, to answers.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use llava_next_video::engine::{Engine, Generation, GenerationOptions};
use llava_next_video::processor::inputs::ModelInputs;
use serde_json::json;

use crate::args::{Format, GenerateArgs};
use crate::ask::untrimmed_text_of;
use crate::media::LoadedMedia;
use crate::model::{self, RunOptions};
use crate::output;
use crate::pipeline::{self, Clock, Pipeline, StageBars};
use crate::stream::Text;

/// Runs the command.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let options = RunOptions::new(&args.model.run)?;
    let sampling = model::sampling(&args.generation.frames)?;
    let pipeline = Pipeline::open(args.model.model.as_deref(), true)?;
    let generation = model::generation(&args.generation, &pipeline.generation, None)?;
    let start = Instant::now();
    let (media, inputs) = match (&args.conversation, &args.inputs) {
        (Some(path), _) => {
            let file = pipeline::read_conversations(path)?;
            let media = LoadedMedia::load(&file.conversations, sampling)?;
            let inputs = pipeline.inputs(&file.conversations, &media, true)?;
            (media, inputs)
        }
        (None, Some(path)) => (LoadedMedia::default(), read_inputs(path, &pipeline)?.0),
        (None, None) => anyhow::bail!("give --conversation or --inputs"),
    };
    let media_s = pipeline::seconds(start);
    let frames: usize = inputs.videos.iter().map(|video| video.frames.count).sum();
    let loaded = options.load(pipeline.config.clone(), &pipeline.files, frames)?;
    let clock = Clock {
        media_s,
        load_s: loaded.seconds,
    };
    let mut engine = Engine::new(Arc::new(loaded.model), pipeline.generation.clone());
    let mut bars = StageBars::new();
    let text = Text(&pipeline.processor.tokenizer);
    let result = engine.generate(&inputs, &generation, &text, &mut |event| bars.show(&event));
    bars.finish();
    let result = result?;
    print(args.format, &pipeline, &generation, &result, clock)?;
    pipeline::report(&media, clock, &result);
    Ok(())
}

/// Reads processed inputs and, where the file has them, labels.
pub fn read_inputs(
    path: &std::path::Path,
    pipeline: &Pipeline,
) -> Result<(ModelInputs, Option<Vec<Vec<i64>>>)> {
    let bytes = pipeline::read_file(path)?;
    let read = ModelInputs::from_safetensors(&bytes, pipeline.processor.facts())
        .with_context(|| path.display().to_string())?;
    Ok((read.inputs, read.labels))
}

fn print(
    format: Format,
    pipeline: &Pipeline,
    options: &GenerationOptions,
    result: &Generation,
    clock: Clock,
) -> Result<()> {
    let texts = result
        .completions
        .iter()
        .map(|completion| untrimmed_text_of(pipeline, &completion.ids, options))
        .collect::<Result<Vec<String>>>()?;
    if format == Format::Text {
        for text in texts {
            output::line(text.trim())?;
        }
        return Ok(());
    }
    let t = &result.timings;
    let mut object = json!({
        "sequences": result.completions.iter().map(|c| &c.ids).collect::<Vec<_>>(),
        "texts": texts,
        "finish_reasons":
            result.completions.iter().map(|c| c.finish_reason.name()).collect::<Vec<_>>(),
        "prompt_tokens": result.prompt_tokens,
        "timings": {
            "media_s": clock.media_s, "load_s": clock.load_s, "vision_s": t.vision_s,
            "prefill_s": t.prefill_s, "decode_s": t.decode_s, "decode_steps": t.decode_steps,
        },
    });
    if result.completions.iter().any(|c| c.score.is_some()) {
        let scores: Vec<_> = result.completions.iter().map(|c| c.score).collect();
        object["sequences_scores"] = json!(scores);
    }
    output::line(&object.to_string())
}

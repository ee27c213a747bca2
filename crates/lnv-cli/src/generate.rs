//! `lnv generate`: a conversation file or processed inputs, perhaps a whole batch, to answers.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use llava_next_video::engine::{Engine, Generation, GenerationOptions};
use llava_next_video::processor::inputs::ModelInputs;
use serde_json::json;

use crate::args::{Format, GenerateArgs};
use crate::ask::untrimmed_text_of;
use crate::incoming::reading;
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
    let load = |frames| {
        let loaded = options.load(pipeline.config.clone(), &pipeline.files, frames)?;
        let engine = Engine::new(Arc::new(loaded.model), pipeline.generation.clone());
        anyhow::Ok((engine, loaded.seconds))
    };
    let answer = |engine: &mut Engine, inputs: &ModelInputs| {
        let mut bars = StageBars::new();
        let text = Text(&pipeline.processor.tokenizer);
        let result = engine.generate(inputs, &generation, &text, &mut |event| bars.show(&event));
        bars.finish();
        Ok(result?)
    };
    let ((counts, load_s, result), media_s) = match (&args.conversation, &args.inputs) {
        (Some(path), _) => {
            let conversations = pipeline::read_conversations(path)?.conversations;
            reading(&pipeline, &conversations, sampling, |incoming| {
                // The model is worth loading once there are inputs for it.
                let inputs = incoming.inputs()?;
                let counts = (inputs.frames(), inputs.images.len());
                let (mut engine, load_s) = load(counts.0)?;
                let work = |inputs| answer(&mut engine, &inputs);
                Ok((counts, load_s, incoming.answer(inputs, work)?))
            })?
        }
        (None, Some(path)) => {
            let start = Instant::now();
            let inputs = read_inputs(path, &pipeline)?.0;
            let media_s = pipeline::seconds(start);
            let (mut engine, load_s) = load(inputs.frames())?;
            (((0, 0), load_s, answer(&mut engine, &inputs)?), media_s)
        }
        (None, None) => anyhow::bail!("give --conversation or --inputs"),
    };
    let clock = Clock { media_s, load_s };
    print(args.format, &pipeline, &generation, &result, clock)?;
    pipeline::report(counts, clock, &result);
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

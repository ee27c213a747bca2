//! `lnv ask`: one question, the answer streamed.

use std::io::Read;
use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use llava_next_video::engine::{Engine, Event, Generation, GenerationOptions, StopStrings};
use llava_next_video::processor::conversation::{Content, Conversation, Message, Role};
use llava_next_video::processor::inputs::ModelInputs;

use crate::args::AskArgs;
use crate::incoming::{Incoming, reading};
use crate::model::{self, RunOptions};
use crate::output;
use crate::pipeline::{self, Clock, NamedMedium, Pipeline, StageBars};
use crate::stream::{AnswerStream, Text};

/// Most new tokens where nothing else was typed: an answer, not a book.
pub const DEFAULT_NEW_TOKENS: usize = 512;

/// The longest question that is read from stdin.
const MAX_QUESTION_BYTES: u64 = 1 << 24;

/// Runs the command.
pub fn run(args: &AskArgs, media: Vec<NamedMedium>) -> Result<()> {
    let question = question(&args.question)?;
    let options = RunOptions::new(&args.model.run)?;
    let sampling = model::sampling(&args.generation.frames)?;
    let pipeline = Pipeline::open(args.model.model.as_deref(), true)?;
    let generation = model::generation(
        &args.generation,
        &pipeline.generation,
        Some(DEFAULT_NEW_TOKENS),
    )?;
    let mut content = pipeline::media_content(&media);
    content.push(Content::Text(question));
    let system = args.system.clone();
    let system = system.map(|text| Message::text(Role::System, text));
    let asked = Message::new(Role::User, content);
    let conversations = [Conversation {
        messages: system.into_iter().chain([asked]).collect(),
    }];

    let load = |frames| options.load(pipeline.config.clone(), &pipeline.files, frames);
    let work = |incoming: &Incoming<'_>| {
        let (inputs, loaded) = match options.rope {
            // Scaling to the clip's length needs its length first.
            Some(_) => {
                let inputs = incoming.inputs()?;
                let frames = inputs.frames();
                (inputs, load(frames)?)
            }
            None => {
                let loaded = load(0)?;
                (incoming.inputs()?, loaded)
            }
        };
        let counts = (inputs.frames(), inputs.images.len());
        let mut engine = Engine::new(Arc::new(loaded.model), pipeline.generation.clone());
        let work = |inputs| answer(&mut engine, &pipeline, &inputs, &generation);
        Ok((counts, loaded.seconds, incoming.answer(inputs, work)?))
    };
    let ((counts, load_s, answer), media_s) = reading(&pipeline, &conversations, sampling, work)?;
    pipeline::report(counts, Clock { media_s, load_s }, &answer);
    Ok(())
}

/// The question as typed, or from stdin where that is `-`.
fn question(typed: &str) -> Result<String> {
    let text = match typed {
        "-" => {
            let input = std::io::stdin().lock().take(MAX_QUESTION_BYTES);
            let text = std::io::read_to_string(input).context("cannot read the question")?;
            // The end of the last line is the shell's, not the question's.
            text.trim_end_matches(['\r', '\n']).to_owned()
        }
        text => text.to_owned(),
    };
    if text.trim().is_empty() {
        bail!("the question is empty: write what you want to know");
    }
    Ok(text)
}

/// Generates and prints: streamed where one sequence is picked token by token, whole otherwise.
fn answer(
    engine: &mut Engine,
    pipeline: &Pipeline,
    inputs: &ModelInputs,
    options: &GenerationOptions,
) -> Result<Generation> {
    let tokenizer = &pipeline.processor.tokenizer;
    let beams = options
        .num_beams
        .or(pipeline.generation.num_beams)
        .unwrap_or(1);
    let streamed = beams == 1 && options.num_return_sequences == 1;
    let mut stream = AnswerStream::new(tokenizer, options.stop.clone());
    let eos = &pipeline.generation.eos_token_ids;
    let mut bars = StageBars::new();
    let mut failed = None;
    let mut on_event = |event: Event| {
        let flow = bars.show(&event);
        if let Event::Token { id, .. } = event
            && streamed
            && !eos.contains(&id)
            && let Err(error) = stream.push(id)
        {
            failed = Some(error);
            return ControlFlow::Break(());
        }
        flow
    };
    let result = engine.generate(inputs, options, &Text(tokenizer), &mut on_event);
    bars.finish();
    let generation = result.map_err(|error| anyhow!(error))?;
    if let Some(error) = failed {
        return Err(error);
    }
    if streamed {
        stream.finish()?;
        return Ok(generation);
    }
    for completion in &generation.completions {
        output::line(&text_of(pipeline, &completion.ids, options)?)?;
    }
    Ok(generation)
}

/// The text of an answer, up to a stop string.
pub fn text_of(pipeline: &Pipeline, ids: &[u32], options: &GenerationOptions) -> Result<String> {
    Ok(untrimmed_text_of(pipeline, ids, options)?.trim().to_owned())
}

/// The text of an answer, up to a stop string, with the blanks around it.
pub fn untrimmed_text_of(
    pipeline: &Pipeline,
    ids: &[u32],
    options: &GenerationOptions,
) -> Result<String> {
    let mut text = pipeline.processor.tokenizer.decode(ids, true, None)?;
    let stop = StopStrings::new(options.stop.clone());
    if let Some(found) = stop.find(&text) {
        text.truncate(found.start);
    }
    Ok(text)
}

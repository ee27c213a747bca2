//! `lnv process`: a conversation file to what the Transformers processor returns, as tensors.

use anyhow::Result;

use crate::args::ProcessArgs;
use crate::media::LoadedMedia;
use crate::model;
use crate::output::{self, count};
use crate::pipeline::{self, Pipeline};

/// Runs the command.
pub fn run(args: &ProcessArgs) -> Result<()> {
    output::check_target(&args.output)?;
    let sampling = model::sampling(&args.frames)?;
    let pipeline = Pipeline::open(args.model.as_deref(), true)?;
    let file = pipeline::read_conversations(&args.conversation)?;
    let media = LoadedMedia::load(&file.conversations, sampling)?;
    let inputs = pipeline.inputs(&file.conversations, &media, !args.no_generation_prompt)?;
    inputs.write_safetensors(&args.output)?;
    let columns = inputs.input_ids.first().map_or(0, Vec::len);
    output::say(&format!(
        "{} of {columns} tokens, {}, {}, media {:.2} s -> {}",
        count(inputs.input_ids.len(), "row"),
        count(inputs.images.len(), "image"),
        count(media.frames(), "frame"),
        media.seconds,
        args.output.display()
    ));
    Ok(())
}

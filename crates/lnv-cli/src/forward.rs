//! `lnv forward`: one pass over processed inputs; logits, loss, hidden states and attentions as tensors.

use anyhow::{Context, Result};
use llava_next_video::model::{ForwardOptions, LogitsToKeep, Values};
use llava_next_video::processor::tensors::write_whole;
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::args::ForwardArgs;
use crate::generate::read_inputs;
use crate::model::RunOptions;
use crate::output::{self, count};
use crate::pipeline::Pipeline;

/// Runs the command.
pub fn run(args: &ForwardArgs) -> Result<()> {
    output::check_target(&args.output)?;
    let options = RunOptions::new(&args.model.run)?;
    let pipeline = Pipeline::open(args.model.model.as_deref(), true)?;
    let (inputs, labels) = read_inputs(&args.inputs, &pipeline)?;
    let loaded = options.load(pipeline.config.clone(), &pipeline.files, inputs.frames())?;
    let wanted = ForwardOptions {
        hidden_states: args.hidden_states,
        attentions: args.attentions,
        logits_to_keep: match args.logits_to_keep {
            0 => LogitsToKeep::All,
            n => LogitsToKeep::Last(n),
        },
    };
    // A loss needs every position; asked for fewer, the labels are left alone.
    let labels = labels.filter(|_| args.logits_to_keep == 0);
    let out = loaded.model.forward(&inputs, labels.as_deref(), &wanted)?;

    let mut tensors: Vec<(String, Values)> = vec![("logits".into(), out.logits)];
    if let Some(loss) = out.loss {
        tensors.push((
            "loss".into(),
            Values {
                shape: Vec::new(),
                data: vec![loss],
            },
        ));
    }
    for (name, values) in [
        ("image_hidden_states", out.image_hidden_states),
        ("video_hidden_states", out.video_hidden_states),
    ] {
        tensors.extend(values.map(|values| (name.to_owned(), values)));
    }
    for (name, list) in [
        ("hidden_states", out.hidden_states),
        ("attentions", out.attentions),
    ] {
        let numbered = list.into_iter().enumerate();
        tensors.extend(numbered.map(|(i, values)| (format!("{name}.{i}"), values)));
    }
    let bytes = to_safetensors(&tensors)?;
    write_whole(&args.output, &bytes)?;
    let shape = &tensors[0].1.shape;
    output::say(&format!(
        "logits {shape:?}, {} -> {}",
        count(tensors.len(), "tensor"),
        args.output.display()
    ));
    Ok(())
}

fn to_safetensors(tensors: &[(String, Values)]) -> Result<Vec<u8>> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, values) in tensors {
        // safetensors is little-endian, as is every machine that this program runs on.
        let bytes = bytemuck::cast_slice(&values.data);
        let view = TensorView::new(Dtype::F32, values.shape.clone(), bytes);
        views.push((
            name.as_str(),
            view.with_context(|| format!("cannot lay out {name}"))?,
        ));
    }
    serialize(views, None).context("cannot lay out the tensors")
}

//! The engine on the golden checkpoints: batches, chunks, sessions, sampling, stopping. What is compared
//! is this program with itself, bit for bit where the weights are f32.

#![allow(clippy::unwrap_used, missing_docs)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llava_next_video::config::{CheckpointFiles, Dtype, GenerationConfig, LlavaNextVideoConfig};
use llava_next_video::engine::{
    Engine, Event, FinishReason, Generation, GenerationOptions, Sampling, TokenText, logits,
};
use llava_next_video::model::{
    ForwardInputs, ForwardOptions, ForwardSource, LlavaNextVideoModel, LoadOptions, PastKeyValues,
};
use llava_next_video::processor::inputs::ModelInputs;
use llava_next_video::processor::{LlavaNextVideoProcessor, ModelFacts};
use safetensors::SafeTensors;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden")
}

/// A golden checkpoint, ready to run.
struct Fixture {
    engine: Engine,
    processor: LlavaNextVideoProcessor,
    directory: PathBuf,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let directory = golden().join(name);
        let files = CheckpointFiles::open(&directory).unwrap();
        let config = LlavaNextVideoConfig::read(&files).unwrap();
        let processor =
            LlavaNextVideoProcessor::from_files(&files, &ModelFacts::from(&config)).unwrap();
        let options = LoadOptions {
            dtype: Some(Dtype::F32),
            ..LoadOptions::default()
        };
        let model = LlavaNextVideoModel::load(&files, &options).unwrap();
        let engine = Engine::new(Arc::new(model), GenerationConfig::default());
        Self {
            engine,
            processor,
            directory,
        }
    }

    fn inputs(&self, case: &str) -> ModelInputs {
        let path = self.directory.join(format!("{case}.inputs.safetensors"));
        let bytes = std::fs::read(path).unwrap();
        ModelInputs::from_safetensors(&bytes, self.processor.facts())
            .unwrap()
            .inputs
    }

    fn run(&mut self, inputs: &ModelInputs, options: &GenerationOptions) -> Generation {
        self.engine
            .generate(inputs, options, &(), &mut |_| ControlFlow::Continue(()))
            .unwrap()
    }
}

fn greedy(tokens: usize) -> GenerationOptions {
    GenerationOptions {
        max_new_tokens: Some(tokens),
        eos_token_ids: Some(Vec::new()),
        ..GenerationOptions::default()
    }
}

/// The rows of a batch as batches of one, without padding.
fn single_rows(inputs: &ModelInputs, config: &LlavaNextVideoConfig) -> Vec<ModelInputs> {
    let (mut images, mut videos) = (inputs.images.iter(), inputs.videos.iter());
    let per_frame = config.tokens_per_frame();
    let row = |(ids, mask): (&Vec<u32>, &Vec<bool>)| {
        let ids: Vec<u32> = ids
            .iter()
            .zip(mask)
            .filter(|(_, shown)| **shown)
            .map(|(id, _)| *id)
            .collect();
        let count = |id: u32| ids.iter().filter(|x| **x == id).count();
        let mut single = ModelInputs {
            attention_mask: vec![vec![true; ids.len()]],
            ..ModelInputs::default()
        };
        let mut left = count(config.image_token_index);
        while left > 0 {
            let image = images.next().unwrap();
            left -= image.layout.feature_tokens();
            single.images.push(image.clone());
        }
        let mut left = count(config.video_token_index);
        while left > 0 {
            let video = videos.next().unwrap();
            left -= video.frames.count * per_frame;
            single.videos.push(video.clone());
        }
        single.input_ids = vec![ids];
        single
    };
    inputs
        .input_ids
        .iter()
        .zip(&inputs.attention_mask)
        .map(row)
        .collect()
}

#[test]
fn a_batched_row_equals_the_row_alone() {
    for name in [
        "llama-default",
        "mistral-window",
        "qwen2-windows",
        "llama-gqa-linear-rope",
    ] {
        let mut fixture = Fixture::new(name);
        let inputs = fixture.inputs("batch-kinds");
        let config = fixture.engine.model().config().clone();
        let batch = fixture.run(&inputs, &greedy(24));
        for (row, single) in single_rows(&inputs, &config).iter().enumerate() {
            let alone = fixture.run(single, &greedy(24));
            assert_eq!(
                batch.completions[row].ids, alone.completions[0].ids,
                "{name} row {row}"
            );
        }
    }
}

#[test]
fn a_prompt_in_chunks_equals_the_prompt_whole() {
    for name in [
        "llama-default",
        "mistral-window",
        "qwen2-windows",
        "siglip-full",
    ] {
        let mut fixture = Fixture::new(name);
        let inputs = fixture.inputs("batch-kinds");
        let whole = fixture.run(&inputs, &greedy(16));
        for chunk in [1, 7, 64, 65] {
            fixture.engine.set_prefill_chunk(chunk);
            let cut = fixture.run(&inputs, &greedy(16));
            assert_eq!(
                cut.completions, whole.completions,
                "{name} in chunks of {chunk}"
            );
        }
    }
}

/// Two turns, the second with a new image: the engine runs only what is new and answers the same.
#[test]
fn a_chat_goes_on_with_new_media() {
    let mut fixture = Fixture::new("llama-default");
    let config = fixture.engine.model().config().clone();
    let whole = fixture.inputs("images-over-turns");
    let whole = single_rows(&whole, &config).remove(0);
    assert!(whole.images.len() >= 2, "the case has several images");
    let ids = &whole.input_ids[0];
    // The first turn ends before the second image begins.
    let first_length = whole.images[0].layout.feature_tokens();
    let places: Vec<usize> = (0..ids.len())
        .filter(|i| ids[*i] == config.image_token_index)
        .collect();
    let cut = places[first_length];
    let first = ModelInputs {
        input_ids: vec![ids[..cut].to_vec()],
        attention_mask: vec![vec![true; cut]],
        images: vec![whole.images[0].clone()],
        videos: Vec::new(),
    };
    let turn = |fixture: &mut Fixture, inputs: &ModelInputs| {
        let watch = &mut |_: Event| ControlFlow::Continue(());
        let options = greedy(8);
        fixture
            .engine
            .generate(inputs, &options, &(), watch)
            .unwrap()
    };
    let one = turn(&mut fixture, &first);
    assert_eq!(one.cached_tokens, 0);
    let two = turn(&mut fixture, &whole);
    assert_eq!(
        two.cached_tokens, cut,
        "everything before the new image is kept"
    );
    let fresh = Fixture::new("llama-default").run(&whole, &greedy(8));
    assert_eq!(two.completions[0].ids, fresh.completions[0].ids);

    // Another picture under the same ids is no match, though the ids are.
    let mut other = whole.clone();
    let pixels = Arc::make_mut(&mut other.images[0].tiles.data);
    pixels.iter_mut().for_each(|x| *x = -*x);
    let three = turn(&mut fixture, &other);
    assert!(
        three.cached_tokens <= places[0],
        "the cache is not asked by ids alone"
    );
    let fresh = Fixture::new("llama-default").run(&other, &greedy(8));
    assert_eq!(three.completions[0].ids, fresh.completions[0].ids);
    assert_eq!(fixture.engine.blocks_in_use(), 0);
}

#[test]
fn samples_depend_on_the_seed_and_on_nothing_else() {
    let mut fixture = Fixture::new("llama-default");
    let inputs = fixture.inputs("one-video");
    let mut sample = |seed: u64, returned: usize| {
        let options = GenerationOptions {
            sampling: Some(Sampling {
                temperature: 1.5,
                ..Sampling::default()
            }),
            seed,
            num_return_sequences: returned,
            ..greedy(12)
        };
        let generation = fixture.run(&inputs, &options);
        generation
            .completions
            .into_iter()
            .map(|c| c.ids)
            .collect::<Vec<_>>()
    };
    let three = sample(7, 3);
    assert_eq!(three, sample(7, 3));
    assert_ne!(three[0], three[1], "answers to one prompt are drawn apart");
    assert_eq!(three[0], sample(7, 1)[0]);
    assert_ne!(three[0], sample(8, 1)[0]);
}

#[test]
fn lengths_follow_the_reference() {
    let mut fixture = Fixture::new("llama-default");
    let inputs = fixture.inputs("text-only");
    let columns = inputs.input_ids[0].len();
    let default = GenerationOptions {
        eos_token_ids: Some(Vec::new()),
        ..Default::default()
    };
    assert_eq!(fixture.run(&inputs, &default).completions[0].ids.len(), 20);
    let length = GenerationOptions {
        max_length: Some(columns + 5),
        ..default.clone()
    };
    let generation = fixture.run(&inputs, &length);
    assert_eq!(generation.completions[0].ids.len(), 5);
    assert_eq!(
        generation.completions[0].finish_reason,
        FinishReason::Length
    );

    let refused = |fixture: &mut Fixture, options: GenerationOptions| {
        let watch = &mut |_: Event| ControlFlow::Continue(());
        fixture
            .engine
            .generate(&inputs, &options, &(), watch)
            .unwrap_err()
            .to_string()
    };
    let short = GenerationOptions {
        max_length: Some(columns),
        ..default.clone()
    };
    let message = refused(&mut fixture, short);
    assert!(message.contains("`max_length` is set to"), "{message}");
    assert!(message.contains("max_new_tokens"), "{message}");
    let several = GenerationOptions {
        num_return_sequences: 2,
        ..default.clone()
    };
    assert!(refused(&mut fixture, several).contains("num_return_sequences"));
    let beams = GenerationOptions {
        num_beams: Some(2),
        num_return_sequences: 3,
        ..default.clone()
    };
    assert!(refused(&mut fixture, beams).contains("num_beams"));
    let cold = Sampling {
        temperature: f32::NAN,
        ..Sampling::default()
    };
    let cold = GenerationOptions {
        sampling: Some(cold),
        ..default
    };
    assert!(refused(&mut fixture, cold).contains("temperature"));
}

#[test]
fn a_prompt_longer_than_the_context_says_how_much_fits() {
    let mut fixture = Fixture::new("llama-default");
    let context = fixture
        .engine
        .model()
        .config()
        .text_config
        .max_position_embeddings;
    let ids = vec![5; context];
    let inputs = ModelInputs {
        attention_mask: vec![vec![true; ids.len()]],
        input_ids: vec![ids],
        ..ModelInputs::default()
    };
    let watch = &mut |_: Event| ControlFlow::Continue(());
    let error = fixture
        .engine
        .generate(&inputs, &greedy(1), &(), watch)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&format!("{context} tokens")), "{error}");
    assert!(error.contains("--num-frames"), "{error}");
}

/// Letters stand for ids.
struct Letters;

impl TokenText for Letters {
    fn text(&self, ids: &[u32]) -> String {
        ids.iter()
            .filter_map(|id| char::from_u32(0x4e00 + id))
            .collect()
    }
}

#[test]
fn a_stop_string_ends_the_answer_with_its_tokens_kept() {
    let mut fixture = Fixture::new("llama-default");
    let inputs = fixture.inputs("one-image");
    let all = fixture.run(&inputs, &greedy(12)).completions[0].ids.clone();
    let stop = Letters.text(&all[3..5]);
    let options = GenerationOptions {
        stop: vec![stop],
        ..greedy(12)
    };
    let watch = &mut |_: Event| ControlFlow::Continue(());
    let cut = fixture
        .engine
        .generate(&inputs, &options, &Letters, watch)
        .unwrap();
    assert_eq!(cut.completions[0].ids, all[..5]);
    assert_eq!(cut.completions[0].finish_reason, FinishReason::Stop);
}

#[test]
fn a_caller_can_stop_at_any_event() {
    let mut fixture = Fixture::new("llama-default");
    let inputs = fixture.inputs("one-video");
    for (at, wanted) in [("vision", 0), ("prefill", 0), ("token", 3)] {
        let mut tokens = 0;
        let mut watch = |event: Event| {
            let hit = match event {
                Event::Vision { .. } => at == "vision",
                Event::Prefill { .. } => at == "prefill",
                Event::Token { .. } => {
                    tokens += 1;
                    at == "token" && tokens == 3
                }
            };
            if hit {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let got = fixture
            .engine
            .generate(&inputs, &greedy(12), &(), &mut watch)
            .unwrap();
        assert_eq!(got.completions[0].ids.len(), wanted, "{at}");
        assert_eq!(got.completions[0].finish_reason, FinishReason::Cancelled);
        assert_eq!(fixture.engine.blocks_in_use(), 0);
    }
}

#[test]
fn scores_are_processed_as_in_transformers() {
    let directory = golden().join("functions");
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(directory.join("logits_processors.json")).unwrap())
            .unwrap();
    let bytes = std::fs::read(directory.join("logits_processors.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rows = |name: &str| -> Vec<Vec<f32>> {
        let tensor = tensors.tensor(name).unwrap();
        let values: Vec<f32> = tensor
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        values
            .chunks(tensor.shape()[1])
            .map(<[f32]>::to_vec)
            .collect()
    };
    let ids: Vec<Vec<u32>> = serde_json::from_value(json["ids"].clone()).unwrap();
    let known = [
        "do_sample",
        "num_beams",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    ];
    let mut compared = 0;
    for entry in json["entries"].as_array().unwrap() {
        let (name, options) = (entry["name"].as_str().unwrap(), &entry["options"]);
        if options
            .as_object()
            .unwrap()
            .keys()
            .any(|k| !known.contains(&k.as_str()))
        {
            continue;
        }
        let number = |key: &str| options[key].as_f64().map(|x| x as f32);
        let mut scores = rows(&format!("{name}.scores"));
        let wanted = rows(&format!("{name}.processed"));
        for ((scores, ids), wanted) in scores.iter_mut().zip(&ids).zip(&wanted) {
            if let Some(penalty) = number("repetition_penalty") {
                logits::repetition_penalty(scores, ids, penalty);
            }
            if let Some(n) = options["no_repeat_ngram_size"].as_u64() {
                logits::no_repeat_ngram(scores, ids, n as usize);
            }
            if options["do_sample"] == true {
                let usual = Sampling::default();
                let sampling = Sampling {
                    temperature: number("temperature").unwrap_or(usual.temperature),
                    top_k: options["top_k"]
                        .as_u64()
                        .map_or(usual.top_k, |k| k as usize),
                    top_p: number("top_p").unwrap_or(usual.top_p),
                    min_p: number("min_p").unwrap_or(usual.min_p),
                };
                let keep = if options["num_beams"].as_u64().unwrap_or(1) > 1 {
                    2
                } else {
                    1
                };
                logits::warp(scores, &sampling, keep);
            }
            for (i, (ours, theirs)) in scores.iter().zip(wanted).enumerate() {
                let same = ours == theirs || (ours - theirs).abs() <= 1e-6 * theirs.abs();
                assert!(same, "{name}: score {i} is {ours} instead of {theirs}");
            }
            compared += 1;
        }
    }
    assert!(compared >= 20, "only {compared} rows");
}

/// A pass in two halves over a cache, the second with a new image, equals the pass whole; embeddings and
/// positions from outside give what ids give.
#[test]
fn a_forward_pass_can_be_continued() {
    let fixture = Fixture::new("llama-default");
    let model = fixture.engine.model();
    let config = model.config();
    let inputs = single_rows(&fixture.inputs("images-over-turns"), config).remove(0);
    let ids = &inputs.input_ids[0];
    let second = inputs.images[0].layout.feature_tokens();
    let places: Vec<usize> = (0..ids.len())
        .filter(|i| ids[*i] == config.image_token_index)
        .collect();
    let cut = places[second] - 1;
    let half = |range: std::ops::Range<usize>, images: &[_]| ModelInputs {
        attention_mask: vec![vec![true; range.len()]],
        input_ids: vec![ids[range].to_vec()],
        images: images.to_vec(),
        videos: Vec::new(),
    };
    let options = ForwardOptions {
        hidden_states: true,
        attentions: true,
        ..ForwardOptions::default()
    };
    let whole = model.forward(&inputs, None, &options).unwrap();
    let mut past = PastKeyValues::default();
    let mut pass = |inputs: &ModelInputs| {
        let source = ForwardSource::Inputs(inputs);
        let inputs = ForwardInputs {
            source,
            position_ids: None,
            labels: None,
        };
        model.forward_with(&inputs, &options, &mut past).unwrap()
    };
    let one = pass(&half(0..cut, &inputs.images[..1]));
    let two = pass(&half(cut..ids.len(), &inputs.images[1..]));
    assert_eq!(past.columns(), ids.len());
    assert_eq!(
        [one.logits.data, two.logits.data.clone()].concat(),
        whole.logits.data
    );
    let (new, all) = (ids.len() - cut, ids.len());
    let heads = config.text_config.num_attention_heads;
    assert_eq!(two.attentions[0].shape, [1, heads, new, all]);
    let last_row = |values: &[f32]| values[values.len() - all..].to_vec();
    assert_eq!(
        last_row(&two.attentions[0].data),
        last_row(&whole.attentions[0].data)
    );

    let text = single_rows(&fixture.inputs("text-only"), config).remove(0);
    let wanted = model.forward(&text, None, &options).unwrap();
    let embeds = model.embed_ids(&text.input_ids).unwrap();
    let positions: Vec<Vec<u32>> = vec![(0..text.input_ids[0].len() as u32).collect()];
    let given = ForwardInputs {
        source: ForwardSource::Embeds(&embeds, &text.attention_mask),
        position_ids: Some(&positions),
        labels: None,
    };
    let got = model
        .forward_with(&given, &options, &mut PastKeyValues::default())
        .unwrap();
    assert_eq!(got.logits, wanted.logits);
    assert_eq!(got.hidden_states, wanted.hidden_states);
    let short = vec![vec![0; 2]];
    let bad = ForwardInputs {
        position_ids: Some(&short),
        ..given
    };
    let error = model.forward_with(&bad, &options, &mut PastKeyValues::default());
    assert!(error.unwrap_err().to_string().contains("position_ids"));
}

//! The processor against goldens of Transformers 4.53.3 (`testdata/golden`, made by `tools/golden`).
//! `LNV_GOLDEN` names another folder; where there is none, every test says so and passes.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use llava_next_video::config::CheckpointFiles;
use llava_next_video::media::{Image, ImageSize, Video, VideoMetadata};
use llava_next_video::processor::anyres::AnyResLayout;
use llava_next_video::processor::chat_template::{ChatTemplate, TemplateOptions};
use llava_next_video::processor::conversation::{Conversation, MediaSource};
use llava_next_video::processor::image_processor::LlavaNextImageProcessor;
use llava_next_video::processor::inputs::{ModelInputs, Pixels};
use llava_next_video::processor::resize::{Arithmetic, Resample, Resizer};
use llava_next_video::processor::tokenizer::{Tokenizer, clean_up_tokenization};
use llava_next_video::processor::video_processor::{LlavaNextVideoVideoProcessor, sample_frames};
use llava_next_video::processor::{LlavaNextVideoProcessor, ModelFacts, ProcessOptions};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;

fn golden() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden");
    let folder = std::env::var_os("LNV_GOLDEN").map_or(default, PathBuf::from);
    if folder.join("functions").is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: no golden data in {}", folder.display());
    None
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn numbers(value: &Value) -> Vec<usize> {
    list(value).iter().map(number).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
    let view = file.tensor(name).ok()?;
    let values = match view.dtype() {
        safetensors::Dtype::F32 => view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        safetensors::Dtype::U8 => view.data().iter().map(|&b| b.into()).collect(),
        other => panic!("{name} is {other:?}"),
    };
    Some((view.shape().to_vec(), values))
}

fn pictures(file: &SafeTensors<'_>, name: &str) -> Vec<Image> {
    let view = file.tensor(name).unwrap();
    let &[ref leading @ .., height, width, channels] = view.shape() else {
        panic!()
    };
    assert_eq!(channels, 3);
    let size = ImageSize::new(height, width);
    let count: usize = leading.iter().product();
    (0..count)
        .map(|i| Image {
            size,
            data: view.data()[i * size.area() * 3..][..size.area() * 3].to_vec(),
        })
        .collect()
}

fn facts(config: &Value) -> ModelFacts {
    let vision = &config["vision_config"];
    ModelFacts {
        text_model_type: config["text_config"]["model_type"]
            .as_str()
            .unwrap_or("llama")
            .into(),
        image_size: number(&vision["image_size"]),
        patch_size: number(&vision["patch_size"]),
        has_cls: vision["model_type"] == "clip_vision_model",
        vision_feature_select_strategy: config["vision_feature_select_strategy"]
            .as_str()
            .unwrap()
            .into(),
        image_token_id: number(&config["image_token_index"]) as u32,
        video_token_id: number(&config["video_token_index"]) as u32,
        spatial_pool_stride: number(&config["spatial_pool_stride"]),
        image_grid_pinpoints: list(&config["image_grid_pinpoints"])
            .iter()
            .map(|pair| ImageSize::new(number(&pair[0]), number(&pair[1])))
            .collect(),
    }
}

#[test]
fn anyres_layouts() {
    let Some(golden) = golden() else { return };
    let file = json(&golden.join("functions/anyres.json"));
    for entry in list(&file["entries"]) {
        let row = numbers(entry);
        let grid = &file["grids"][row[0]];
        let pinpoints: Vec<_> = list(&grid["pinpoints"])
            .iter()
            .map(|pair| ImageSize::new(number(&pair[0]), number(&pair[1])))
            .collect();
        let (tile, patch) = (number(&grid["image_size"]), number(&grid["patch_size"]));
        let layout =
            AnyResLayout::new(ImageSize::new(row[1], row[2]), &pinpoints, tile, patch).unwrap();
        let got = [
            layout.best_resolution.height,
            layout.best_resolution.width,
            layout.grid.rows,
            layout.grid.cols,
            layout.tiles,
            layout.window.rows,
            layout.window.cols,
            layout.feature_tokens(),
        ];
        let want = [
            row[3], row[4], row[5], row[6], row[7], row[12], row[13], row[14],
        ];
        assert_eq!(got, want, "{entry}");
    }
}

#[test]
fn resized_pictures() {
    let Some(golden) = golden() else { return };
    let bytes = std::fs::read(golden.join("functions/resize.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for entry in list(&json(&golden.join("functions/resize.json"))["entries"]) {
        let index = &entry["index"];
        let source = &pictures(&file, &format!("{index}.input"))[0];
        let to = numbers(&entry["to"]);
        for (name, arithmetic) in [
            ("pillow", Arithmetic::Pillow),
            ("torch", Arithmetic::Torchvision),
        ] {
            if name == "torch" && entry["torch"] == false {
                continue;
            }
            let want = &pictures(&file, &format!("{index}.{name}"))[0];
            let to = ImageSize::new(to[0], to[1]);
            let got = Resizer::whole(source.size, to, Resample::Bicubic, arithmetic)
                .unwrap()
                .resize(source)
                .unwrap();
            assert!(got == *want, "{entry} {name}");
        }
    }
}

/// Tiles against `[P, 3, H, W]` of a batch that is padded to `P` tiles.
fn assert_same(got: &Pixels, want: &[f32], what: &str) {
    let used = got.data.len();
    assert!(got.data[..] == want[..used], "{what}: values differ");
    assert!(
        want[used..].iter().all(|&v| v == 0.0),
        "{what}: more tiles than expected"
    );
}

#[test]
fn image_processors() {
    let Some(golden) = golden() else { return };
    let bytes = std::fs::read(golden.join("functions/image_processor.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let media = std::fs::read(golden.join("media/images.safetensors")).unwrap();
    let media = SafeTensors::deserialize(&media).unwrap();
    for entry in list(&json(&golden.join("functions/image_processor.json"))["entries"]) {
        let images: Vec<_> = list(&entry["images"])
            .iter()
            .map(|path| {
                pictures(&media, path.as_str().unwrap().trim_start_matches("media/")).remove(0)
            })
            .collect();
        for (kind, arithmetic) in [
            ("slow", Arithmetic::Pillow),
            ("fast", Arithmetic::Torchvision),
        ] {
            let name = format!("{}.{kind}.pixel_values", entry["name"].as_str().unwrap());
            let Some((shape, want)) = floats(&file, &name) else {
                continue;
            };
            let options = entry["options"].as_object().unwrap();
            let processor = LlavaNextImageProcessor::from_json(options, arithmetic, "x").unwrap();
            let got = processor.preprocess(&images, 2).unwrap();
            assert_eq!(got.len(), shape[0], "{name}");
            for (got, want) in got.iter().zip(want.chunks_exact(want.len() / shape[0])) {
                // Fitted to 3 rows, the reference's padding takes these for channels and garbles the tiles.
                if kind == "slow" && got.layout.image_size == ImageSize::new(5, 90) {
                    continue;
                }
                assert_eq!(
                    [got.tiles.size.height, got.tiles.size.width],
                    shape[3..],
                    "{name}"
                );
                assert_same(&got.tiles, want, &name);
            }
        }
    }
}

fn video(frames: Vec<Image>, fps: f64) -> Video {
    Video {
        frames_indices: (0..frames.len()).collect(),
        timestamps: vec![0.0; frames.len()],
        metadata: VideoMetadata {
            total_num_frames: frames.len(),
            fps,
            duration: 1.0,
        },
        notes: vec![],
        frames,
    }
}

#[test]
fn video_processors() {
    let Some(golden) = golden() else { return };
    let bytes = std::fs::read(golden.join("functions/video_processor.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for entry in list(&json(&golden.join("functions/video_processor.json"))["entries"]) {
        let name = entry["name"].as_str().unwrap();
        // Pictures are RGB before they come here.
        let rgb = |i: usize| {
            file.tensor(&format!("{name}.input.{i}"))
                .unwrap()
                .shape()
                .last()
                == Some(&3)
        };
        let clips = number(&entry["clips"]);
        if !(0..clips).all(rgb) {
            continue;
        }
        for (output, arithmetic) in [
            ("pixel_values_videos", Arithmetic::Torchvision),
            ("slow", Arithmetic::Pillow),
        ] {
            let Some((shape, want)) = floats(&file, &format!("{name}.{output}")) else {
                continue;
            };
            let options = entry["options"].as_object().unwrap();
            let mut processor =
                LlavaNextVideoVideoProcessor::from_json(options, arithmetic, "x").unwrap();
            processor.do_sample_frames = entry["call"]["do_sample_frames"] == true;
            let videos: Vec<_> = (0..clips)
                .map(|i| {
                    let mut frames = pictures(&file, &format!("{name}.input.{i}"));
                    if processor.do_sample_frames && output == "pixel_values_videos" {
                        let fps = entry["call"]["video_metadata"][0][0]["fps"]
                            .as_f64()
                            .unwrap_or(1.0);
                        let metadata = video(vec![], fps).metadata;
                        let count = entry["call"]["num_frames"].as_u64().map(|n| n as usize);
                        let rate = entry["call"]["fps"].as_f64();
                        let indices = processor
                            .frames_indices(frames.len(), count, rate, Some(&metadata))
                            .unwrap();
                        frames = indices.iter().map(|&i| frames[i].clone()).collect();
                    }
                    video(frames, 4.0)
                })
                .collect();
            let got = processor.preprocess(&videos).unwrap();
            assert_eq!(got.len(), shape[0]);
            for (got, want) in got.iter().zip(want.chunks_exact(want.len() / shape[0])) {
                assert_eq!(got.frames.count, shape[1], "{name}.{output}");
                assert_same(&got.frames, want, &format!("{name}.{output}"));
            }
        }
    }
}

#[test]
fn frame_sampling() {
    let Some(golden) = golden() else { return };
    let file = json(&golden.join("functions/frames.json"));
    for entry in list(&file["by_count"]) {
        let got = sample_frames(
            number(&entry["total"]),
            Some(number(&entry["num_frames"])),
            None,
            None,
        );
        assert_eq!(
            got.ok(),
            entry["indices"]
                .as_array()
                .map(|_| numbers(&entry["indices"])),
            "{entry}"
        );
    }
    for entry in list(&file["by_fps"]) {
        // At least one frame, as Transformers 5 decided; 4.53.3 divides by zero.
        if entry["num_frames"] == 0 {
            continue;
        }
        let metadata = video(vec![], entry["video_fps"].as_f64().unwrap()).metadata;
        let got = sample_frames(
            number(&entry["total"]),
            None,
            entry["fps"].as_f64(),
            Some(&metadata),
        );
        assert_eq!(
            got.ok(),
            entry["indices"]
                .as_array()
                .map(|_| numbers(&entry["indices"])),
            "{entry}"
        );
    }
}

#[test]
fn chat_templates() {
    let Some(golden) = golden() else { return };
    let file = json(&golden.join("functions/templates.json"));
    let special = file["special_tokens"].as_object().unwrap();
    let mut wrong = vec![];
    for entry in list(&file["entries"]) {
        let conversation = &file["conversations"][entry["conversation"].as_str().unwrap()];
        // A string stands for one text part here; in the reference the template meets the string itself.
        if list(conversation)
            .iter()
            .any(|message| message["content"].is_string())
        {
            continue;
        }
        let template = file["templates"][entry["template"].as_str().unwrap()]
            .as_str()
            .unwrap_or_default();
        let source = match entry["template"].as_str().unwrap() {
            _ if !template.is_empty() => template,
            other => panic!("no template {other}"),
        };
        let flag = |name: &str| entry["options"][name] == true;
        let options = TemplateOptions {
            add_generation_prompt: flag("add_generation_prompt"),
            continue_final_message: flag("continue_final_message"),
            return_assistant_spans: entry["assistant_spans"].is_array(),
            ..TemplateOptions::default()
        };
        let messages = Conversation::from_json(conversation).unwrap().messages;
        let got = ChatTemplate::new(source, "x")
            .unwrap()
            .render(&messages, special, &options);
        let spans: Vec<_> = match &entry["assistant_spans"] {
            Value::Array(spans) => spans
                .iter()
                .map(|span| number(&span[0])..number(&span[1]))
                .collect(),
            _ => vec![],
        };
        let ok = match (&got, entry["text"].as_str(), entry["error"].as_str()) {
            (Ok(got), Some(text), _) => got.text == text && got.assistant_spans == spans,
            (Err(got), None, Some(error)) => {
                let words = error.strip_prefix("TemplateError: ");
                words.is_none_or(|words| got.to_string().contains(words))
            }
            _ => false,
        };
        if !ok {
            wrong.push(format!("{entry}\n     got {got:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

fn tokenizers(golden: &Path) -> Vec<(Value, Tokenizer)> {
    let file = json(&golden.join("functions/decode.json"));
    list(&file["tokenizers"])
        .iter()
        .map(|entry| {
            let files =
                CheckpointFiles::open(&golden.join(entry["checkpoint"].as_str().unwrap())).unwrap();
            (entry.clone(), Tokenizer::from_files(&files).unwrap())
        })
        .collect()
}

#[test]
fn encoding_and_decoding() {
    let Some(golden) = golden() else { return };
    for entry in list(&json(&golden.join("functions/decode.json"))["cleanup"]) {
        assert_eq!(
            clean_up_tokenization(entry[0].as_str().unwrap()),
            entry[1].as_str().unwrap()
        );
    }
    for (entry, tokenizer) in tokenizers(&golden) {
        for case in list(&entry["encode"]) {
            let text = case["text"].as_str().unwrap();
            let what = format!("{} {text:?}", entry["checkpoint"]);
            assert_eq!(
                tokenizer.encode(text, true).unwrap(),
                ids(&case["ids"]),
                "{what}"
            );
            assert_eq!(
                tokenizer.encode(text, false).unwrap(),
                ids(&case["ids_plain"]),
                "{what}"
            );
        }
        for case in list(&entry["decode"]) {
            let ids = ids(&case["ids"]);
            for (name, skip, clean) in [
                ("text", false, Some(false)),
                ("skip", true, Some(false)),
                ("skip_clean", true, Some(true)),
                ("default", false, None),
            ] {
                let want = case[name].as_str().unwrap();
                assert_eq!(
                    tokenizer.decode(&ids, skip, clean).unwrap(),
                    want,
                    "{case} {name}"
                );
                assert_eq!(
                    stream(&tokenizer, &ids, skip, clean),
                    want,
                    "{case} {name} streamed"
                );
            }
        }
    }
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool, clean: Option<bool>) -> String {
    let mut detokenizer = tokenizer.detokenizer(skip, clean);
    let mut text: String = ids.iter().filter_map(|&id| detokenizer.push(id)).collect();
    text.extend(detokenizer.flush());
    assert_eq!(detokenizer.flush(), None);
    text
}

#[test]
fn streams_of_any_ids_equal_decoding_them_at_once() {
    let Some(golden) = golden() else { return };
    let tokenizers = tokenizers(&golden);
    let strategy = (
        proptest::collection::vec((0_u32..420, 0_u8..4), 0..40),
        any::<bool>(),
        any::<bool>(),
    );
    proptest!(ProptestConfig::with_cases(400), |((draws, skip, clean) in strategy)| {
        for (_, tokenizer) in &tokenizers {
            // A quarter of the ids are bytes, so that characters span tokens.
            let ids: Vec<u32> = draws
                .iter()
                .map(|&(id, kind)| match kind {
                    0 => tokenizer.token_to_id(&format!("<0x{:02X}>", id % 256)).unwrap_or(id),
                    _ => id,
                })
                .collect();
            let whole = tokenizer.decode(&ids, skip, Some(clean)).unwrap();
            prop_assert_eq!(stream(tokenizer, &ids, skip, Some(clean)), whole, "{:?}", ids);
        }
    });
}

#[test]
fn streams_of_text_come_word_by_word() {
    let Some(golden) = golden() else { return };
    for (_, tokenizer) in tokenizers(&golden) {
        let ids = tokenizer
            .encode("What is shown in this image? Ünïcödé 你好 🎉 done", false)
            .unwrap();
        let mut detokenizer = tokenizer.detokenizer(true, None);
        let pieces: Vec<_> = ids.iter().filter_map(|&id| detokenizer.push(id)).collect();
        assert!(pieces.len() >= 9, "{pieces:?}");
    }
}

/// The images and sampled videos of a case, and whether the videos' pixels are the real ones.
struct Media {
    images: Vec<Image>,
    videos: Vec<Video>,
    real: bool,
}

fn load_media(golden: &Path, conversations: &[Conversation], kwargs: &Value) -> Media {
    let info = json(&golden.join("media/media.json"));
    let image_bytes = std::fs::read(golden.join("media/images.safetensors")).unwrap();
    let image_file = SafeTensors::deserialize(&image_bytes).unwrap();
    let video_bytes = std::fs::read(golden.join("media/videos.safetensors")).unwrap();
    let video_file = SafeTensors::deserialize(&video_bytes).unwrap();
    let name = |source: &MediaSource| match source {
        MediaSource::Path(path) => path.file_name().unwrap().to_str().unwrap().to_owned(),
        other => panic!("{other:?}"),
    };
    let image = |source: &MediaSource| pictures(&image_file, &name(source)).remove(0);
    let mut media = Media {
        images: vec![],
        videos: vec![],
        real: true,
    };
    for conversation in conversations {
        media
            .images
            .extend(conversation.images().flatten().map(image));
        for source in conversation.videos().flatten() {
            if let MediaSource::Frames(frames) = source {
                media
                    .videos
                    .push(video(frames.iter().map(image).collect(), 1.0));
                continue;
            }
            let entry = list(&info["videos"])
                .iter()
                .find(|video| video["path"].as_str().unwrap().ends_with(&name(source)))
                .unwrap();
            let metadata = video(
                vec![],
                entry["fps"][0].as_f64().unwrap() / entry["fps"][1].as_f64().unwrap(),
            )
            .metadata;
            let count = kwargs["num_frames"].as_u64().map(|n| n as usize);
            let indices = sample_frames(
                number(&entry["frames"]),
                count,
                kwargs["fps"].as_f64(),
                Some(&metadata),
            )
            .unwrap();
            let frames: HashMap<_, _> = numbers(&entry["samples"])
                .into_iter()
                .zip(pictures(&video_file, &name(source)))
                .collect();
            let black = frames.values().next().unwrap();
            let frames: Vec<_> = indices
                .iter()
                .map(|i| {
                    media.real &= frames.contains_key(i);
                    frames.get(i).unwrap_or(black).clone()
                })
                .collect();
            media.videos.push(video(frames, 1.0));
        }
    }
    media
}

fn check_case(golden: &Path, processor: &LlavaNextVideoProcessor, case: &Value) {
    let conversations: Vec<_> = list(&case["conversations"])
        .iter()
        .map(|c| Conversation::from_json(c).unwrap())
        .collect();
    let media = load_media(golden, &conversations, &case["processor_kwargs"]);
    let template = TemplateOptions {
        add_generation_prompt: case["template_kwargs"]["add_generation_prompt"] == true,
        continue_final_message: case["template_kwargs"]["continue_final_message"] == true,
        ..TemplateOptions::default()
    };
    let got = processor
        .apply_chat_template(
            &conversations,
            &media.images,
            &media.videos,
            &template,
            &ProcessOptions::default(),
        )
        .unwrap();
    assert_eq!(Value::from(got.rendered.clone()), case["rendered"]);
    let want: Vec<Vec<u32>> = list(&case["input_ids"]).iter().map(ids).collect();
    assert_eq!(got.inputs.input_ids, want);
    let mask: Vec<Vec<bool>> = list(&case["attention_mask"])
        .iter()
        .map(|row| ids(row).iter().map(|&b| b == 1).collect())
        .collect();
    assert_eq!(got.inputs.attention_mask, mask);
    let lengths: Vec<_> = got
        .inputs
        .images
        .iter()
        .map(|image| image.layout.feature_tokens())
        .collect();
    assert_eq!(lengths, numbers(&case["image_lengths"]));
    let bytes = std::fs::read(golden.join(case["inputs"].as_str().unwrap())).unwrap();
    let read = ModelInputs::from_safetensors(&bytes, processor.facts())
        .unwrap()
        .inputs;
    assert!(read.images == got.inputs.images, "pixel_values differ");
    if media.real {
        assert!(
            read.videos == got.inputs.videos,
            "pixel_values_videos differ"
        );
        assert_eq!(read, got.inputs);
        // Written again, the file holds the same tensors.
        let own = got.inputs.to_safetensors().unwrap();
        let (own, want) = (
            SafeTensors::deserialize(&own).unwrap(),
            SafeTensors::deserialize(&bytes).unwrap(),
        );
        for name in want.names() {
            let (own, want) = (own.tensor(name).unwrap(), want.tensor(name).unwrap());
            assert!(own == want, "{name} is written differently");
        }
    }
}

#[test]
fn whole_conversations() {
    let Some(golden) = golden() else { return };
    let (mut checked, mut wrong) = (0, vec![]);
    for folder in std::fs::read_dir(&golden)
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        if !folder.join("cases.json").exists() {
            continue;
        }
        let facts = facts(&json(&folder.join("config.json")));
        let processor =
            LlavaNextVideoProcessor::from_files(&CheckpointFiles::open(&folder).unwrap(), &facts)
                .unwrap();
        assert_eq!(processor.notes, Vec::<String>::new());
        for case in list(&json(&folder.join("cases.json"))["cases"]) {
            if case["kind"] == "conversation" {
                checked += 1;
                let run = std::panic::AssertUnwindSafe(|| check_case(&golden, &processor, case));
                if std::panic::catch_unwind(run).is_err() {
                    wrong.push(format!("{} {}", folder.display(), case["name"]));
                }
            } else {
                let bytes = std::fs::read(golden.join(case["inputs"].as_str().unwrap())).unwrap();
                let read = ModelInputs::from_safetensors(&bytes, &facts).unwrap();
                assert_eq!(read.labels.is_some(), !case["loss"].is_null());
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {checked} differ: {wrong:#?}",
        wrong.len()
    );
}

#[test]
fn the_note_of_the_seed_page_is_followed_when_settings_are_missing() {
    let Some(golden) = golden() else { return };
    let folder = tempfile::tempdir().unwrap();
    let source = golden.join("llama-default");
    for file in [
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ] {
        std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
    }
    let mut facts = facts(&json(&source.join("config.json")));
    facts.image_token_id = 99;
    let files = CheckpointFiles::open(folder.path()).unwrap();
    let processor = LlavaNextVideoProcessor::from_files(&files, &facts).unwrap();
    assert_eq!(
        (processor.patch_size, processor.num_additional_image_tokens),
        (5, 1)
    );
    assert_eq!(processor.vision_feature_select_strategy, "default");
    assert_eq!(
        processor.video_processor.settings.crop_size,
        ImageSize::square(20)
    );
    let notes = processor.notes.join("\n");
    assert!(
        notes.contains("built-in vicuna template") && notes.contains("the id 348, config.json 99"),
        "{notes}"
    );
    std::fs::remove_file(folder.path().join("preprocessor_config.json")).unwrap();
    let five = serde_json::json!({
        "patch_size": 5, "num_additional_image_tokens": 0,
        "image_processor": {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}, "image_grid_pinpoints": [[20, 40]]},
        "video_processor": {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}, "resample": 2},
    });
    std::fs::write(
        folder.path().join("processor_config.json"),
        five.to_string(),
    )
    .unwrap();
    let processor = LlavaNextVideoProcessor::from_files(&files, &facts).unwrap();
    assert_eq!(
        processor.image_processor.image_grid_pinpoints,
        [ImageSize::new(20, 40)]
    );
    assert_eq!(
        processor.video_processor.settings.resample,
        Resample::Bilinear
    );
    assert!(
        processor
            .notes
            .iter()
            .any(|note| note.contains("num_additional_image_tokens 0"))
    );
}

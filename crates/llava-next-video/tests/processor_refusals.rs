//! What the processor refuses, in which words, and what it makes of harmless oddities; no golden data.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use llava_next_video::config::CheckpointFiles;
use llava_next_video::media::{Image, ImageSize, Video, VideoMetadata};
use llava_next_video::processor::chat_template::{ChatTemplate, Family, TemplateOptions};
use llava_next_video::processor::conversation::{
    Content, Conversation, ConversationFile, MediaSource, Message, Role,
};
use llava_next_video::processor::inputs::ModelInputs;
use llava_next_video::processor::tokenizer::{PaddingSide, Tokenizer};
use llava_next_video::processor::{LlavaNextVideoProcessor, ModelFacts, Padding, ProcessOptions};
use serde_json::{Map, Value, json};

fn facts() -> ModelFacts {
    ModelFacts {
        text_model_type: "llama".into(),
        image_size: 20,
        patch_size: 5,
        has_cls: true,
        vision_feature_select_strategy: "default".into(),
        image_token_id: 6,
        video_token_id: 5,
        spatial_pool_stride: 2,
        image_grid_pinpoints: [(20, 40), (40, 20)]
            .map(|(h, w)| ImageSize::new(h, w))
            .to_vec(),
    }
}

/// A tokenizer of single characters, with the six special tokens of a LLaMA checkpoint before them.
fn tokenizer_json() -> String {
    let special = ["<unk>", "<s>", "</s>", "<pad>", "<x>", "<video>", "<image>"];
    let mut vocab: Map<String, Value> = special
        .iter()
        .enumerate()
        .map(|(i, t)| ((*t).into(), i.into()))
        .collect();
    for c in ('a'..='z').chain('A'..='Z').chain(" :?\n".chars()) {
        let id = vocab.len();
        vocab.insert(c.into(), id.into());
    }
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": false},
        "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
    .to_string()
}

fn checkpoint(folder: &Path) -> CheckpointFiles {
    std::fs::write(folder.join("tokenizer.json"), tokenizer_json()).unwrap();
    let config = json!({"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>"});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    CheckpointFiles::open(folder).unwrap()
}

fn processor() -> LlavaNextVideoProcessor {
    let folder = tempfile::tempdir().unwrap();
    LlavaNextVideoProcessor::from_files(&checkpoint(folder.path()), &facts()).unwrap()
}

fn image(height: usize, width: usize) -> Image {
    Image {
        size: ImageSize::new(height, width),
        data: vec![77; height * width * 3],
    }
}

fn video(frames: usize) -> Video {
    Video {
        frames: vec![image(30, 40); frames],
        frames_indices: (0..frames).collect(),
        timestamps: vec![0.0; frames],
        metadata: VideoMetadata {
            total_num_frames: frames,
            fps: 1.0,
            duration: 1.0,
        },
        notes: vec![],
    }
}

fn assert_says<T: std::fmt::Debug>(result: Result<T, llava_next_video::Error>, part: &str) {
    let message = result.unwrap_err().to_string();
    assert!(
        message.contains(part),
        "{message:?} does not contain {part:?}"
    );
    assert!(
        !message.contains('\n') && message.len() < 400,
        "{message:?} is not one plain sentence"
    );
}

#[test]
fn conversations_say_which_message_is_wrong() {
    for (text, part) in [
        ("nonsense", "not valid JSON"),
        ("{}", "must be a list of messages"),
        ("[]", "no messages"),
        ("[\"hello\"]", "message 0 is a string"),
        (r#"[{"content": []}]"#, "message 0 has no role"),
        (
            r#"[{"role": 3, "content": []}]"#,
            "message 0 has the role 3",
        ),
        (r#"[{"role": "user"}]"#, "message 0 has no content"),
        (
            r#"[{"role": "user", "content": 5}]"#,
            "message 0 has content that is a number",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "text"}]}]"#,
            "part 0: a text part needs",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "audio"}]}]"#,
            "its type is \"audio\"",
        ),
        (
            r#"[{"role": "user", "content": [{"text": "x"}]}]"#,
            "its type is missing",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "image", "url": "http://a", "path": "b"}]}]"#,
            "both url and path",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "image", "path": 3}]}]"#,
            "its path is a number",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "video", "path": []}]}]"#,
            "its path is an empty list",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#,
            "OpenAI's form",
        ),
        (
            r#"[[{"role": "user", "content": "a"}], [3]]"#,
            "conversation 1: message 0 is a number",
        ),
    ] {
        assert_says(ConversationFile::parse(text), part);
    }
}

#[test]
fn sources_are_told_apart_by_their_beginning() {
    let long = "A".repeat(100);
    for (part, source) in [
        (
            json!({"type": "image", "path": "a.png"}),
            MediaSource::Path("a.png".into()),
        ),
        (
            json!({"type": "image", "url": "/a b.png"}),
            MediaSource::Path("/a b.png".into()),
        ),
        (
            json!({"type": "image", "url": "file:///a.png"}),
            MediaSource::Path("/a.png".into()),
        ),
        (
            json!({"type": "image", "path": "https://a/b"}),
            MediaSource::Url("https://a/b".into()),
        ),
        (
            json!({"type": "image", "base64": "AAAA"}),
            MediaSource::Base64("AAAA".into()),
        ),
        (
            json!({"type": "image", "image": "data:image/png;base64,AA"}),
            MediaSource::Base64("data:image/png;base64,AA".into()),
        ),
        (
            json!({"type": "image", "image": long}),
            MediaSource::Base64(long.clone()),
        ),
    ] {
        let conversation =
            Conversation::from_json(&json!([{"role": "user", "content": [part]}])).unwrap();
        assert_eq!(
            conversation.messages[0].content,
            [Content::Image(Some(source))]
        );
    }
    let file = json!([{"role": "user", "name": "x", "content": [{"type": "video", "video": ["a.png", "http://b"]}, {"type": "image"}]}]);
    let conversation = Conversation::from_json(&file).unwrap();
    let frames = MediaSource::Frames(vec![
        MediaSource::Path("a.png".into()),
        MediaSource::Url("http://b".into()),
    ]);
    assert_eq!(conversation.videos().collect::<Vec<_>>(), [Some(&frames)]);
    assert_eq!(conversation.images().collect::<Vec<_>>(), [None]);
    assert_eq!(conversation.messages[0].extra["name"], "x");
    let text = ConversationFile::parse(r#"[{"role": "user", "content": "hi"}]"#).unwrap();
    assert_eq!(
        text.conversations[0].messages,
        [Message::text(Role::User, "hi")]
    );
    assert!(!text.batched);
}

fn render(source: &str) -> Result<String, llava_next_video::Error> {
    let messages = [
        Message::text(Role::User, "Größe <b>"),
        Message::text(Role::Assistant, " yes "),
    ];
    let options = TemplateOptions {
        variables: json!({"d": {"b": [1, 2.5, null], "a": "ü\"<"}, "n": 3})
            .as_object()
            .unwrap()
            .clone(),
        ..TemplateOptions::default()
    };
    ChatTemplate::new(source, "x.jinja")?
        .render(&messages, &Map::new(), &options)
        .map(|r| r.text)
}

#[test]
fn templates_behave_like_transformers_jinja() {
    for (source, want) in [
        ("{{ d | tojson }}", r#"{"b": [1, 2.5, null], "a": "ü\"<"}"#),
        (
            "{{ d | tojson(indent=2) }}",
            "{\n  \"b\": [\n    1,\n    2.5,\n    null\n  ],\n  \"a\": \"ü\\\"<\"\n}",
        ),
        (
            "{{ d | tojson(sort_keys=true, ensure_ascii=true) }}",
            r#"{"a": "\u00fc\"<", "b": [1, 2.5, null]}"#,
        ),
        (
            "{{ d | tojson(separators=(',', ':')) }}",
            r#"{"b":[1,2.5,null],"a":"ü\"<"}"#,
        ),
        (
            "{{ d }} {{ true }} {{ none }} {{ nothing }}|",
            "{'b': [1, 2.5, None], 'a': 'ü\"<'} True None |",
        ),
        ("{{ messages[0]['content'][0]['text'] }}", "Größe <b>"),
        (
            "{{ messages[0].role.upper() ~ ' x '.strip() ~ 'a-b'.split('-')[1] }}",
            "USERxb",
        ),
        (
            "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "user",
        ),
        (
            "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
            "3",
        ),
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        (
            "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}",
            "True True False",
        ),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(n) }}", "[3]"),
        ("a{%- generation -%} b {%- endgeneration -%} c", "abc"),
        ("{% generation %}\nb\n{% endgeneration %}\nc", "b\nc"),
        (r"{{ '<\s> ' }}", r"<\s> "),
        ("{{ messages[1:] | length }} {{ 'es' in 'yes' }}", "1 True"),
    ] {
        assert_eq!(render(source).unwrap(), want, "{source}");
    }
}

#[test]
fn templates_that_fail_end_in_a_sentence() {
    for (source, part) in [
        ("{% if %}", "x.jinja is not a valid chat template"),
        (
            "{{ raise_exception('Only users!') }}",
            "refuses this conversation: Only users!",
        ),
        (
            "{{ messages.nothing.more }}",
            "x.jinja cannot render this conversation",
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "cannot render",
        ),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
            "does not end",
        ),
        (
            "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
            "cannot render",
        ),
        ("{% include 'other' %}", "cannot render"),
        ("{{ nothing | tojson }}", "cannot render"),
    ] {
        assert_says(render(source), part);
    }
}

#[test]
fn spans_of_the_assistant_are_counted_in_characters() {
    let source = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endfor %}";
    let messages = [
        Message::text(Role::User, "ü\u{F0000}"),
        Message::text(Role::Assistant, "ab"),
    ];
    let options = TemplateOptions {
        return_assistant_spans: true,
        ..TemplateOptions::default()
    };
    let rendered = ChatTemplate::new(source, "x")
        .unwrap()
        .render(&messages, &Map::new(), &options)
        .unwrap();
    assert_eq!(rendered.text, "user:ü\u{F0000}assistant:ab");
    assert_eq!(rendered.assistant_spans, [5..7, 17..19]);
}

/// The four turns of the documentation page.
fn four_turns(with_system: bool) -> Vec<Message> {
    let image = || Content::Image(None);
    let text = |text: &str| Content::Text(text.into());
    let mut messages = vec![
        Message::text(
            Role::System,
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, \
             detailed, and polite answers to the human's questions.",
        ),
        Message::new(
            Role::User,
            vec![text("What’s shown in this image?"), image()],
        ),
        Message::text(Role::Assistant, "This image shows a red stop sign."),
        Message::new(
            Role::User,
            vec![text("Why is this video funny?"), Content::Video(None)],
        ),
    ];
    if !with_system {
        messages.remove(0);
    }
    messages
}

#[test]
fn built_in_templates_render_the_documented_conversation() {
    let render = |family: Family, system: bool| {
        let options = TemplateOptions {
            add_generation_prompt: true,
            ..TemplateOptions::default()
        };
        ChatTemplate::new(family.source(), "x").unwrap().render(
            &four_turns(system),
            &Map::new(),
            &options,
        )
    };
    let system = "A chat between a curious human and an artificial intelligence assistant. The assistant gives \
                  helpful, detailed, and polite answers to the human's questions.";
    assert_eq!(
        render(Family::Vicuna, true).unwrap().text,
        format!(
            "{system} USER: <image>\nWhat’s shown in this image? ASSISTANT: This image shows a red stop sign. USER: \
             <video>\nWhy is this video funny? ASSISTANT:"
        )
    );
    assert_eq!(
        render(Family::Mistral, false).unwrap().text,
        "[INST] <image>\nWhat’s shown in this image? [/INST] This image shows a red stop sign.<\\s> [INST] \
         <video>\nWhy is this video funny? [/INST]"
    );
    assert_says(
        render(Family::Mistral, true),
        "Only user and assistant roles are supported!",
    );
    assert_eq!(
        render(Family::ChatMl, true).unwrap().text,
        format!(
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<image>\nWhat’s shown in this \
             image?<|im_end|>\n<|im_start|>assistant\nThis image shows a red stop sign.<|im_end|>\n<|im_start|>user\n\
             <video>\nWhy is this video funny?<|im_end|>\n<|im_start|>assistant\n"
        )
    );
}

#[test]
fn continuing_a_message_cuts_after_its_text() {
    let processor = processor();
    let messages = [
        Message::text(Role::User, "a"),
        Message::text(Role::Assistant, "b c "),
    ];
    assert_eq!(
        processor.render(&messages, false, true).unwrap(),
        "USER: a ASSISTANT: b c "
    );
    assert_says(
        processor.render(&messages, true, true),
        "exclude each other",
    );
    let silent = [Message::new(Role::User, vec![Content::Image(None)])];
    assert_says(
        processor.render(&silent, false, true),
        "no text to go on with",
    );
}

#[test]
fn counts_of_media_and_placeholders_must_agree() {
    let processor = processor();
    let run = |text: &str, images: usize, videos: usize| {
        let images = vec![image(30, 40); images];
        processor.process(
            &[text.to_owned()],
            &images,
            &vec![video(2); videos],
            &ProcessOptions::default(),
        )
    };
    assert_says(
        run("<image> a", 0, 0),
        "1 image placeholder (<image>), but 0 images were given",
    );
    assert_says(
        run("a", 1, 0),
        "0 image placeholders (<image>), but 1 image was given",
    );
    assert_says(
        run("<video> <video>", 0, 3),
        "2 video placeholders (<video>), but 3 videos were given",
    );
    assert_says(
        processor.process(&[], &[], &[], &ProcessOptions::default()),
        "no text",
    );
    // The literal of the reference's temporary word is only text.
    let ids = run("<placeholder><image>", 1, 0)
        .unwrap()
        .input_ids
        .remove(0);
    let layout = processor
        .image_processor
        .layout(ImageSize::new(30, 40), 5)
        .unwrap();
    assert_eq!(
        ids.iter().filter(|&&id| id == 6).count(),
        layout.feature_tokens()
    );
    assert_eq!(
        ids.len(),
        1 + "<placeholder>".len() + layout.feature_tokens()
    );
}

#[test]
fn every_video_has_its_own_length() {
    let processor = processor();
    let inputs = processor
        .process(
            &["<video>a<video>".into()],
            &[],
            &[video(1), video(3)],
            &ProcessOptions::default(),
        )
        .unwrap();
    let runs: Vec<_> = inputs.input_ids[0]
        .split(|&id| id != 5)
        .map(<[u32]>::len)
        .filter(|&n| n > 0)
        .collect();
    assert_eq!(runs, [4, 12]);
    assert_says(inputs.to_safetensors(), "different numbers of frames");
}

#[test]
fn rows_are_padded_on_the_side_asked_for() {
    let processor = processor();
    let texts = ["ab".to_owned(), "abcd".to_owned()];
    let run = |options: ProcessOptions| processor.process(&texts, &[], &[], &options);
    let left = run(ProcessOptions::default()).unwrap();
    assert_eq!(left.input_ids[0], [3, 3, 1, 7, 8]);
    assert_eq!(left.attention_mask[0], [false, false, true, true, true]);
    let options = ProcessOptions {
        padding: Padding::MaxLength(7),
        padding_side: Some(PaddingSide::Right),
        ..ProcessOptions::default()
    };
    assert_eq!(run(options).unwrap().input_ids[0], [1, 7, 8, 3, 3, 3, 3]);
    assert_says(
        run(ProcessOptions {
            padding: Padding::No,
            ..ProcessOptions::default()
        }),
        "padding is off",
    );
    let options = ProcessOptions {
        truncate: Some(3),
        ..ProcessOptions::default()
    };
    assert_eq!(
        run(options.clone()).unwrap().input_ids,
        [[1, 7, 8], [1, 7, 8]]
    );
    let cut = processor.process(&["<image>".into()], &[image(9, 9)], &[], &options);
    assert_says(cut, "placeholders");
}

#[test]
fn settings_that_do_not_fit_the_model_are_refused_when_used() {
    let folder = tempfile::tempdir().unwrap();
    let files = checkpoint(folder.path());
    let write = |json: Value| {
        std::fs::write(
            folder.path().join("preprocessor_config.json"),
            json.to_string(),
        )
        .unwrap()
    };
    let run = || {
        let processor = LlavaNextVideoProcessor::from_files(&files, &facts()).unwrap();
        let image = processor.process(
            &["<image>".into()],
            &[image(30, 40)],
            &[],
            &ProcessOptions::default(),
        );
        let video = processor.process(
            &["<video>".into()],
            &[],
            &[video(1)],
            &ProcessOptions::default(),
        );
        (image, video)
    };
    write(json!({"size": 224, "crop_size": 224}));
    let (image, video) = run();
    assert_says(
        image,
        "224 x 224 pixels, but the vision tower takes 20 x 20",
    );
    assert_says(
        video,
        "224 x 224 pixels, but the vision tower takes 20 x 20",
    );
    write(json!({"size": 20, "crop_size": 20, "image_grid_pinpoints": [[40, 40]]}));
    let (image, video) = run();
    assert_says(image, "5 tiles");
    assert!(video.is_ok());
    write(json!({"size": 20, "crop_size": 20, "image_grid_pinpoints": []}));
    let processor = LlavaNextVideoProcessor::from_files(&files, &facts());
    assert_says(processor, "image_grid_pinpoints");
}

#[test]
fn tokenizer_files_that_cannot_be_used_end_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::open(folder.path()).unwrap();
    assert_says(Tokenizer::from_files(&files), "has no tokenizer.json");
    std::fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
    assert_says(Tokenizer::from_files(&files), "convert it once");
    let good = tokenizer_json();
    for bad in [
        "",
        "[]",
        "{\"version\": \"1.0\"}",
        &good[..good.len() / 2],
        &good.replace("WordLevel", "Word"),
    ] {
        std::fs::write(folder.path().join("tokenizer.json"), bad).unwrap();
        assert_says(
            Tokenizer::from_files(&files),
            "not a tokenizer that can be read",
        );
    }
    std::fs::write(
        folder.path().join("tokenizer.json"),
        good.replace("<s>", "<q>"),
    )
    .unwrap();
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        r#"{"tokenizer_class": "LlamaTokenizer"}"#,
    )
    .unwrap();
    assert_says(
        Tokenizer::from_files(&files),
        "add_bos_token is true, but there is no bos_token",
    );
}

fn tensors(
    change: impl FnOnce(&mut Vec<(&'static str, safetensors::Dtype, Vec<usize>, Vec<u8>)>),
) -> Result<ModelInputs, llava_next_video::Error> {
    use safetensors::Dtype::{F32, I64};
    let i64s = |values: &[i64]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let mut parts = vec![
        ("input_ids", I64, vec![1, 3], i64s(&[1, 6, 2])),
        ("attention_mask", I64, vec![1, 3], i64s(&[1, 1, 1])),
        ("image_sizes", I64, vec![1, 2], i64s(&[30, 40])),
        (
            "pixel_values",
            F32,
            vec![1, 3, 3, 20, 20],
            vec![0; 3 * 3 * 400 * 4],
        ),
    ];
    change(&mut parts);
    let views = parts.iter().map(|(name, dtype, shape, data)| {
        (
            *name,
            safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap(),
        )
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    ModelInputs::from_safetensors(&bytes, &facts()).map(|read| read.inputs)
}

#[test]
fn input_tensors_are_checked() {
    use safetensors::Dtype::{BF16, F32, F64, I32, I64};
    let read = tensors(|_| {}).unwrap();
    assert_eq!(
        (read.images[0].tiles.count, read.images[0].layout.tiles),
        (3, 3)
    );
    let flat = tensors(|t| {
        t[3] = (
            "pixel_values",
            BF16,
            vec![3, 3, 20, 20],
            vec![0; 3 * 3 * 400 * 2],
        )
    })
    .unwrap();
    assert_eq!(flat, read);
    assert!(tensors(|t| t[0] = ("input_ids", I32, vec![1, 3], vec![1; 12])).is_ok());
    assert!(
        tensors(|t| drop(t.remove(1))).unwrap().attention_mask[0]
            .iter()
            .all(|&on| on)
    );
    let i64s = |values: &[i64]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    assert_says(
        ModelInputs::from_safetensors(b"nonsense", &facts()),
        "not a safetensors file",
    );
    assert_says(tensors(|t| drop(t.remove(0))), "no input_ids");
    assert_says(
        tensors(|t| t[0] = ("input_ids", F32, vec![1, 3], vec![0; 12])),
        "of type F32",
    );
    assert_says(
        tensors(|t| t[0] = ("input_ids", I64, vec![3], vec![0; 24])),
        "must have two axes",
    );
    assert_says(
        tensors(|t| t[0] = ("input_ids", I64, vec![0, 3], vec![])),
        "holds nothing",
    );
    assert_says(tensors(|t| t[0].3 = i64s(&[1, -6, 2])), "the id -6");
    assert_says(tensors(|t| t[1].3 = i64s(&[1, 2, 1])), "the value 2");
    assert_says(
        tensors(|t| t[1] = ("attention_mask", I64, vec![1, 2], vec![0; 16])),
        "has shape [1, 2]",
    );
    assert_says(tensors(|t| drop(t.remove(2))), "image_sizes are missing");
    assert_says(tensors(|t| drop(t.remove(3))), "pixel_values are missing");
    assert_says(tensors(|t| t[2].3 = i64s(&[0, 40])), "height 0");
    assert_says(
        tensors(|t| t[2].3 = i64s(&[i64::MAX, 40])),
        "which no image has",
    );
    assert_says(
        tensors(|t| t[2] = ("image_sizes", I64, vec![2, 2], i64s(&[9, 9, 9, 9]))),
        "hold 1 images",
    );
    assert_says(
        tensors(|t| t[2] = ("image_sizes", I64, vec![1, 3], i64s(&[9, 9, 9]))),
        "3 columns",
    );
    assert_says(
        tensors(|t| {
            t[3] = (
                "pixel_values",
                F32,
                vec![1, 2, 3, 20, 20],
                vec![0; 2400 * 4],
            )
        }),
        "2 tiles for image 0",
    );
    assert_says(
        tensors(|t| t[3] = ("pixel_values", F32, vec![2, 3, 20, 20], vec![0; 2400 * 4])),
        "the image_sizes need 3",
    );
    assert_says(
        tensors(|t| t[3] = ("pixel_values", F32, vec![0, 3, 3, 20, 20], vec![])),
        "holds no picture",
    );
    assert_says(
        tensors(|t| t[3] = ("pixel_values", F64, vec![1, 3, 20, 20], vec![0; 1200 * 8])),
        "of type F64",
    );
    assert_says(
        tensors(|t| t[3] = ("pixel_values", F32, vec![1, 3, 3, 4, 4], vec![0; 144 * 4])),
        "4 x 4 pixels",
    );
    assert_says(
        tensors(|t| t[3] = ("pixel_values", F32, vec![3, 20, 20], vec![0; 1200 * 4])),
        "must have 4 axes",
    );
    let videos = (
        "pixel_values_videos",
        F32,
        vec![2, 3, 20, 20],
        vec![0; 2400 * 4],
    );
    assert_says(tensors(|t| t.push(videos)), "must be [videos, frames");
}

#[test]
fn files_are_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.safetensors");
    let inputs = tensors(|_| {}).unwrap();
    inputs.write_safetensors(&path).unwrap();
    inputs.write_safetensors(&path).unwrap();
    let read = ModelInputs::from_safetensors(&std::fs::read(&path).unwrap(), &facts()).unwrap();
    assert_eq!(read.inputs, inputs);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_says(
        inputs.write_safetensors(&folder.path().join("no/such/place")),
        "cannot write",
    );
    if Path::new("/dev/full").exists() {
        assert_says(
            inputs.write_safetensors(Path::new("/dev/full")),
            "cannot write /dev/full",
        );
    }
}

#[test]
fn a_prompt_that_begins_with_bos_gets_no_second_one() {
    let folder = tempfile::tempdir().unwrap();
    let files = checkpoint(folder.path());
    let template = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    std::fs::write(
        folder.path().join("additional_chat_templates/short.jinja"),
        "x",
    )
    .unwrap();
    let processor = LlavaNextVideoProcessor::from_files(&files, &facts()).unwrap();
    let conversation = Conversation {
        messages: vec![Message::text(Role::User, "a<image>")],
    };
    let run = |options: &TemplateOptions| {
        processor.apply_chat_template(
            std::slice::from_ref(&conversation),
            &[image(9, 9)],
            &[],
            options,
            &ProcessOptions::default(),
        )
    };
    let options = TemplateOptions {
        return_assistant_spans: true,
        ..TemplateOptions::default()
    };
    let got = run(&options).unwrap();
    assert_eq!(got.inputs.input_ids[0][..3], [1, 7, 6]);
    let mask = &got.assistant_masks.unwrap()[0];
    assert_eq!(
        (mask.len(), mask[0], mask[1..].iter().all(|&on| on)),
        (got.inputs.input_ids[0].len(), false, true)
    );
    let short = TemplateOptions {
        template: Some("short".into()),
        ..TemplateOptions::default()
    };
    assert_eq!(
        processor
            .render_with(&conversation.messages, &short)
            .unwrap()
            .text,
        "x"
    );
    let none = TemplateOptions {
        template: Some("none".into()),
        ..TemplateOptions::default()
    };
    assert_says(
        processor.render_with(&conversation.messages, &none),
        "this checkpoint has default, short",
    );
}

#[test]
fn an_explicit_number_of_additional_tokens_is_obeyed_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let files = checkpoint(folder.path());
    let write = |file: &str, json: Value| {
        std::fs::write(folder.path().join(file), json.to_string()).unwrap()
    };
    write(
        "preprocessor_config.json",
        json!({"size": 336, "crop_size": 336, "image_grid_pinpoints": [[672, 336]]}),
    );
    let facts = ModelFacts {
        image_size: 336,
        patch_size: 14,
        image_grid_pinpoints: vec![ImageSize::new(672, 336)],
        ..facts()
    };
    // Transformers' test_image_token_filling expects 1525 of the class default 0; the model makes 1526.
    for (additional, tokens, notes) in [(0, 1525, 1), (1, 1526, 0)] {
        write(
            "processor_config.json",
            json!({"num_additional_image_tokens": additional}),
        );
        let processor = LlavaNextVideoProcessor::from_files(&files, &facts).unwrap();
        let inputs = processor
            .process(
                &["<image>".into()],
                &[image(503, 316)],
                &[],
                &ProcessOptions::default(),
            )
            .unwrap();
        assert_eq!(
            inputs.input_ids[0].iter().filter(|&&id| id == 6).count(),
            tokens
        );
        assert_eq!(
            processor
                .notes
                .iter()
                .filter(|note| note.contains("num_additional"))
                .count(),
            notes
        );
    }
}

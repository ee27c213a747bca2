//! Bad input: the right exit status, and one sentence that says what is wrong and what to do.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{Folder, Said, case, conversation_file, copy_of, golden, lnv, run};

const MODEL: &str = "llama-default";

/// Rows of arguments after `ask --model ... --max-new-tokens 2`, exit status, words.
fn check_asks(rows: &[(&[&str], i32, &[&str])]) {
    for (arguments, status, words) in rows {
        let common = ["ask", "--model", MODEL, "Hello"];
        let tokens: &[&str] = match arguments.iter().any(|a| a.starts_with("--max")) {
            true => &[],
            false => &["--max-new-tokens", "2"],
        };
        run(&[&common[..], tokens, arguments].concat()).refuses(*status, words);
    }
}

#[test]
fn media_that_cannot_be_used() {
    let folder = Folder::new();
    let clip = std::fs::read(golden().join("media/clip-64x48.mp4")).unwrap();
    let png = std::fs::read(golden().join("media/rgb-64x64.png")).unwrap();
    let empty = folder.write("empty.mp4", "");
    let text = folder.write("text.mp4", "hello");
    let cut = folder.write("cut.mp4", &clip[..900]);
    let cut_png = folder.write("cut.png", &png[..400]);
    let sound = folder.write("sound.wav", wav());
    let place = folder.path("");
    check_asks(&[
        (
            &["--video", "/nonexistent.mp4"],
            1,
            &["/nonexistent.mp4", "no such file"],
        ),
        (&["--video", &empty], 1, &[&empty, "empty"]),
        (&["--video", &text], 1, &[&text, "not a video"]),
        (&["--video", &cut], 1, &[&cut, "cut off"]),
        (&["--video", &sound], 1, &[&sound, "no video stream"]),
        (&["--video", &place], 1, &["not a regular file"]),
        (&["--video", ""], 1, &["--video is empty"]),
        (&["--video", "media/rgb-64x64.png"], 1, &["pictures"]),
        (&["--video", "data:video/mp4;base64,AAAA"], 1, &["base64"]),
        (
            &["--image", "/nonexistent.png"],
            1,
            &["/nonexistent.png", "no such file"],
        ),
        (&["--image", &empty], 1, &[&empty, "empty"]),
        (&["--image", &text], 1, &[&text, "not a PNG"]),
        (&["--image", &cut_png], 1, &[&cut_png, "cut off"]),
        (&["--image", &sound], 1, &[&sound, "not a PNG"]),
        (&["--image", &place], 1, &["not a regular file"]),
        (&["--image", ""], 1, &["--image is empty"]),
        (&["--image", "media/clip-64x48.mp4"], 1, &["not a PNG"]),
    ]);
}

/// A second of silence.
fn wav() -> Vec<u8> {
    let mut wav = b"RIFF\x64\x1f\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0".to_vec();
    wav.extend(b"\x40\x1f\0\0\x40\x1f\0\0\x01\0\x08\0data\x40\x1f\0\0");
    wav.resize(wav.len() + 8000, 0x80);
    wav
}

#[test]
fn numbers_that_make_no_sense() {
    let clip = ["--video", "media/clip-64x48.mp4"];
    let with = |words: &[&'static str]| [&clip[..], words].concat();
    let frames: [(&[&str], i32, &[&str]); 9] = [
        (&["--num-frames", "0"], 1, &["--num-frames is 0"]),
        (&["--num-frames", "999999999"], 1, &["has only 24"]),
        (&["--num-frames", "99999999999999999999"], 2, &["too large"]),
        (&["--num-frames", "-1"], 2, &["'-1'", "--num-frames"]),
        (
            &["--num-frames", "2", "--fps", "1"],
            2,
            &["cannot be used with"],
        ),
        (&["--fps", "0"], 1, &["--fps is 0"]),
        (&["--fps", "-1"], 1, &["--fps is -1"]),
        (&["--fps", "nan"], 1, &["--fps is NaN"]),
        (&["--fps", "1e300"], 1, &["--fps is above 1000"]),
    ];
    for (words, status, said) in frames {
        check_asks(&[(&with(words), status, said)]);
    }
    check_asks(&[
        (&["--max-new-tokens", "0"], 1, &["max_new_tokens is 0"]),
        (
            &["--max-new-tokens", "18446744073709551615"],
            1,
            &["1048576"],
        ),
        (&["--max-length", "5"], 1, &["max_length", "set to 5"]),
        (&["--num-beams", "0"], 1, &["num_beams is 0"]),
        (&["--num-beams", "1000000"], 1, &["1 to 256"]),
        (
            &["--num-return-sequences", "0"],
            1,
            &["--num-return-sequences is 0"],
        ),
        (
            &["--num-return-sequences", "3"],
            1,
            &["temperature", "num_beams"],
        ),
        (
            &["--num-return-sequences", "3", "--num-beams", "2"],
            1,
            &["(3)", "(2)"],
        ),
        (&["--temperature", "-1"], 1, &["temperature is -1"]),
        (&["--temperature", "nan"], 1, &["temperature is NaN"]),
        (&["--top-p", "0"], 1, &["top_p is 0"]),
        (&["--top-p", "1.5"], 1, &["top_p is 1.5"]),
        (&["--min-p", "2"], 1, &["min_p is 2"]),
        (
            &["--repetition-penalty", "0"],
            1,
            &["repetition_penalty is 0"],
        ),
        (&["--length-penalty", "nan"], 1, &["length_penalty is NaN"]),
        (&["--stop", ""], 1, &["stop string"]),
        (&["--seed", "-1"], 2, &["--seed"]),
        (&["--device", "gpu"], 1, &["gpu", "cpu"]),
        (&["--rope-scaling", "wobble"], 1, &["wobble", "linear:F"]),
        (
            &["--rope-scaling", "linear:0"],
            1,
            &["linear:0", "linear:F"],
        ),
        (&["--dtype", "f64"], 2, &["f64", "bf16"]),
        (&["--quantize", "q9"], 2, &["q9", "nf4"]),
    ]);
}

#[test]
fn questions_and_commands_that_cannot_be_run() {
    run(&["ask", "--model", MODEL, ""]).refuses(1, &["question is empty"]);
    run(&["ask", "--model", MODEL, "-"]).refuses(1, &["question is empty"]);
    run(&["ask", "--model", MODEL, "is <image> red?"]).refuses(1, &["<image>", "0 images"]);
    run(&["ask", "--model", MODEL, "is <video> red?"]).refuses(1, &["<video>", "0 videos"]);
    let two = ["--image", "media/rgb-64x64.png", "is <image> red?"];
    run(&[&["ask", "--model", MODEL], &two[..]].concat()).refuses(1, &["2 image", "1 image was"]);
    run(&["ask", "--model", MODEL]).refuses(2, &["<QUESTION>"]);
    run(&["wobble"]).refuses(2, &["wobble"]);
    run(&["generate", "--model", MODEL]).refuses(2, &["--conversation", "--inputs"]);
    let both = ["--conversation", "a", "--inputs", "b"];
    run(&[&["generate", "--model", MODEL], &both[..]].concat())
        .refuses(2, &["cannot be used with"]);
    run(&["inspect", "--model", ""]).refuses(1, &["--model is empty"]);
    run(&["inspect", "--model", "/nonexistent"]).refuses(1, &["does not exist", "config.json"]);
    run(&["inspect", "--model", "media"]).refuses(1, &["has no config.json"]);
    run(&["inspect", "--model", "media/media.json"]).refuses(1, &["not a directory"]);
    let long = "word ".repeat(400);
    let words = ["ask", "--model", MODEL, &long];
    run(&words).refuses(
        1,
        &["tokens", "context holds 512", "--rope-scaling linear:4"],
    );
}

#[test]
fn conversations_that_cannot_be_read() {
    let folder = Folder::new();
    let user = |content: Value| json!([{"role": "user", "content": content}]).to_string();
    let part = |part: Value| user(json!([part]));
    let rows: [(String, &[&str]); 16] = [
        (String::new(), &["not valid JSON"]),
        ("[{\"role\":".into(), &["not valid JSON"]),
        ("[".repeat(100_000), &["not valid JSON"]),
        ("5".into(), &["list of messages", "a number"]),
        ("[]".into(), &["no messages"]),
        (json!([[]]).to_string(), &["conversation 0", "no messages"]),
        (json!([{"content": "x"}]).to_string(), &["no role"]),
        (json!([{"role": "user"}]).to_string(), &["no content"]),
        (user(json!(5)), &["content", "a number"]),
        (part(json!({"type": "audio"})), &["\"audio\""]),
        (
            part(json!({"type": "image"})),
            &["an image without a source"],
        ),
        (part(json!({"type": "image", "base64": "!"})), &["base64"]),
        (
            part(json!({"type": "image", "path": 5})),
            &["path is a number"],
        ),
        (part(json!({"type": "video", "path": []})), &["empty list"]),
        (
            part(json!({"type": "video", "base64": "AAAA"})),
            &["base64"],
        ),
        (
            part(json!({"type": "text", "text": "<image>"})),
            &["<image>", "0 images"],
        ),
    ];
    for (text, words) in rows {
        let file = folder.write("c.json", text);
        run(&["generate", "--model", MODEL, "--conversation", &file]).refuses(1, words);
    }
    let place = folder.path("");
    for (file, words) in [
        ("/nonexistent.json", ["cannot read", "no such file"]),
        (&place, ["cannot read", "directory"]),
        ("media/rgb-64x64.png", ["not text in UTF-8", "JSON"]),
    ] {
        run(&["generate", "--model", MODEL, "--conversation", file]).refuses(1, &words);
    }
}

/// A safetensors file taken apart: type, shape, bytes.
type Parts = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn take_apart(bytes: &[u8]) -> Parts {
    let (header, data) = header(bytes);
    let mut parts = Parts::new();
    for (name, entry) in header.as_object().unwrap() {
        if name != "__metadata__" {
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
            let at = &entry["data_offsets"];
            let shape = entry["shape"]
                .as_array()
                .unwrap()
                .iter()
                .map(number)
                .collect();
            let bytes = data[number(&at[0])..number(&at[1])].to_vec();
            parts.insert(
                name.clone(),
                (entry["dtype"].as_str().unwrap().into(), shape, bytes),
            );
        }
    }
    parts
}

fn header(bytes: &[u8]) -> (Value, &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    (header, &bytes[8 + length..])
}

/// Put together by hand: the crate would refuse what these tests need.
fn put_together(parts: &Parts) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in parts {
        let at = [data.len(), data.len() + bytes.len()];
        data.extend_from_slice(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": at});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &data,
    ]
    .concat()
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn inputs_that_do_not_fit() {
    let folder = Folder::new();
    let path = golden().join(case(MODEL, "mixed-turns")["inputs"].as_str().unwrap());
    let good = std::fs::read(path).unwrap();
    let refuse = |bytes: &[u8], words: &[&str]| {
        let file = folder.write("inputs.safetensors", bytes);
        let out = folder.path("out.safetensors");
        let forward = [
            "forward", "--model", MODEL, "--inputs", &file, "--output", &out,
        ];
        run(&forward).refuses(1, words);
        run(&["generate", "--model", MODEL, "--inputs", &file]).refuses(1, words);
        assert!(!std::fs::exists(&out).unwrap());
    };
    for n in [0, 5, 8, 50, good.len() / 2, good.len() - 1] {
        refuse(&good[..n], &["inputs.safetensors", "cut short"]);
    }
    type Change = fn(&mut Parts);
    let rows: [(Change, &[&str]); 14] = [
        (|p| drop(p.remove("input_ids")), &["no input_ids"]),
        (
            |p| drop(p.remove("image_sizes")),
            &["image_sizes are missing"],
        ),
        (
            |p| drop(p.remove("pixel_values")),
            &["pixel_values are missing"],
        ),
        (|p| set(p, "input_ids", "F32"), &["input_ids", "F32", "I64"]),
        (
            |p| reshape(p, "input_ids", |s| vec![s[1]]),
            &["input_ids", "two axes"],
        ),
        (
            |p| put(p, "input_ids", &[1, 0], &[]),
            &["input_ids", "[1, 0]"],
        ),
        (|p| put(p, "input_ids", &[1, 174], &[-5; 174]), &["id -5"]),
        (
            |p| put(p, "attention_mask", &[1, 1], &[1]),
            &["attention_mask", "[1, 1]", "[1, 174]"],
        ),
        (
            |p| put(p, "attention_mask", &[1, 174], &[2; 174]),
            &["value 2"],
        ),
        (
            |p| put(p, "attention_mask", &[1, 174], &[0; 174]),
            &["no token"],
        ),
        (|p| put(p, "labels", &[1, 1], &[1]), &["labels", "[1, 1]"]),
        (
            |p| put(p, "image_sizes", &[1, 2], &[1 << 40, 1 << 40]),
            &["which no image has"],
        ),
        (
            |p| reshape(p, "pixel_values", |s| vec![s[0], s[1], 1, 60, 20]),
            &["3 channels"],
        ),
        (
            |p| reshape(p, "pixel_values_videos", |s| vec![s[0], s[1], 3, 10, 40]),
            &["40 x 10", "20 x 20"],
        ),
    ];
    for (change, words) in rows {
        let mut parts = take_apart(&good);
        change(&mut parts);
        refuse(&put_together(&parts), words);
    }
}

fn put(parts: &mut Parts, name: &str, shape: &[usize], values: &[i64]) {
    parts.insert(name.into(), ("I64".into(), shape.to_vec(), i64s(values)));
}

fn set(parts: &mut Parts, name: &str, dtype: &str) {
    let (stored, shape, bytes) = parts.get_mut(name).unwrap();
    *stored = dtype.into();
    bytes.truncate(shape.iter().product::<usize>() * 4);
}

fn reshape(parts: &mut Parts, name: &str, shape: fn(&[usize]) -> Vec<usize>) {
    let part = parts.get_mut(name).unwrap();
    part.1 = shape(&part.1);
}

#[test]
fn configurations_that_cannot_be_run() {
    let folder = copy_of(MODEL);
    let text = std::fs::read_to_string(golden().join(MODEL).join("config.json")).unwrap();
    let rows: [(&str, Value, &[&str]); 16] = [
        (
            "/model_type",
            json!("llava"),
            &["model_type", "llava_next_video"],
        ),
        (
            "/text_config/model_type",
            json!("mamba"),
            &["text_config.model_type", "mamba", "qwen2"],
        ),
        (
            "/vision_config/model_type",
            json!("dino"),
            &["vision_config.model_type", "siglip"],
        ),
        (
            "/text_config/rope_scaling",
            json!({"rope_type": "wobble"}),
            &["rope_type", "wobble", "yarn"],
        ),
        (
            "/text_config/rope_scaling",
            json!({"rope_type": "linear"}),
            &["factor is missing"],
        ),
        (
            "/quantization_config",
            json!({"quant_method": "gptq"}),
            &["quantization_config", "gptq"],
        ),
        (
            "/text_config/partial_rotary_factor",
            json!(0.5),
            &["partial_rotary_factor is 0.5"],
        ),
        (
            "/text_config/hidden_act",
            json!("wobble"),
            &["text_config.hidden_act", "silu"],
        ),
        (
            "/vision_config/hidden_act",
            json!("wobble"),
            &["vision_config.hidden_act"],
        ),
        (
            "/text_config/num_hidden_layers",
            json!(10_u64.pow(12)),
            &["num_hidden_layers"],
        ),
        (
            "/text_config/hidden_size",
            json!("x"),
            &["text_config.hidden_size is \"x\""],
        ),
        (
            "/text_config/num_key_value_heads",
            json!(3),
            &["num_key_value_heads is 3"],
        ),
        ("/vision_config/patch_size", json!(0), &["patch_size is 0"]),
        (
            "/spatial_pool_stride",
            json!(999),
            &["spatial_pool_stride is 999"],
        ),
        (
            "/vision_feature_layer",
            json!(99),
            &["vision_feature_layer", "99"],
        ),
        (
            "/image_grid_pinpoints",
            json!([[1]]),
            &["image_grid_pinpoints"],
        ),
    ];
    for (pointer, value, words) in rows {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[key] = value;
        folder.write("config.json", config.to_string());
        let all = [words, &["config.json"]].concat();
        run(&["inspect", "--model", &folder.path("")]).refuses(1, &all);
    }
}

#[test]
fn files_of_a_checkpoint_that_are_damaged() {
    let names = [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    ];
    let folder = copy_of(MODEL);
    let model = folder.path("");
    for name in names {
        let good = std::fs::read(folder.path(name)).unwrap();
        for bad in [&b"{\"a\": 1,"[..], b"", b"[1]", b"\xff\xfe\0"] {
            folder.write(name, bad);
            run(&["ask", "--model", &model, "Hello"]).refuses(1, &[name]);
        }
        folder.write(name, good);
    }
    let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    let templates: [(&str, &str); 6] = [
        ("{% for m in messages %}{{ m", "not a valid chat template"),
        (endless, "chat_template.jinja"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "recursion",
        ),
        ("{{ 'a' * 100000000000 }}", "too large"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ a.b.c }}", "undefined"),
    ];
    for (template, word) in templates {
        folder.write("chat_template.jinja", template);
        run(&["ask", "--model", &model, "Hello"]).refuses(1, &[word]);
    }
}

#[test]
fn settings_that_are_not_applied_are_told() {
    let folder = copy_of(MODEL);
    let settings = json!({"no_repeat_ngram_size": 2, "num_beam_groups": 1, "eos_token_id": 2});
    folder.write("generation_config.json", settings.to_string());
    let said = run(&[
        "ask",
        "--model",
        &folder.path(""),
        "--max-new-tokens",
        "2",
        "Hello",
    ]);
    assert!(
        said.err.contains("no_repeat_ngram_size = 2"),
        "{}",
        said.err
    );
    assert!(!said.err.contains("num_beam_groups"), "{}", said.err);
    said.answer();
}

#[test]
fn weights_that_are_damaged() {
    const Q: &str = "language_model.model.layers.0.self_attn.q_proj.weight";
    let folder = copy_of(MODEL);
    let model = folder.path("");
    let good = std::fs::read(folder.path("model.safetensors")).unwrap();
    let refuse = |bytes: &[u8], words: &[&str]| {
        folder.write("model.safetensors", bytes);
        let all = [words, &["model.safetensors"]].concat();
        run(&["ask", "--model", &model, "Hello"]).refuses(1, &all);
    };
    let length = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for n in [0, 4, 8, length / 2, length, length + 100, good.len() - 1] {
        refuse(&good[..n], &["download it again"]);
    }
    refuse(&[&good[..], b"xx"].concat(), &["download it again"]);
    refuse(&[0xab; 3000], &["not a safetensors file"]);
    type Change = fn(&mut Parts);
    let rows: [(Change, &[&str]); 4] = [
        (
            |p| drop(p.remove(Q)),
            &["layers.0.self_attn.q_proj.weight", "[32, 32]"],
        ),
        (
            |p| reshape(p, Q, |_| vec![64, 16]),
            &[Q, "[64, 16]", "[32, 32]"],
        ),
        (|p| p.get_mut(Q).unwrap().0 = "I16".into(), &[Q, "I16"]),
        (|p| p.get_mut(Q).unwrap().0 = "WOBBLE".into(), &["WOBBLE"]),
    ];
    for (change, words) in rows {
        let mut parts = take_apart(&good);
        change(&mut parts);
        refuse(&put_together(&parts), words);
    }
    std::fs::remove_file(folder.path("model.safetensors")).unwrap();
    run(&["ask", "--model", &model, "Hello"]).refuses(1, &["*.safetensors", "download"]);
    std::fs::create_dir(folder.path("model.safetensors")).unwrap();
    run(&["ask", "--model", &model, "Hello"]).refuses(1, &["not a regular file"]);
}

#[test]
fn shards_that_are_missing() {
    let folder = copy_of(MODEL);
    let model = folder.path("");
    let shard = "model-00001-of-00002.safetensors";
    let good = std::fs::read(folder.path("model.safetensors")).unwrap();
    std::fs::rename(folder.path("model.safetensors"), folder.path(shard)).unwrap();
    let names: Vec<String> = take_apart(&good).into_keys().collect();
    let map = |other: &str| {
        let mut map: BTreeMap<&str, &str> = names.iter().map(|n| (n.as_str(), shard)).collect();
        map.insert(&names[0], other);
        json!({"weight_map": map}).to_string()
    };
    let index = "model.safetensors.index.json";
    folder.write(index, map(shard));
    run(&["ask", "--model", &model, "--max-new-tokens", "2", "Hello"]).answer();
    for other in [
        "model-00002-of-00002.safetensors",
        "/etc/passwd",
        "../x.safetensors",
    ] {
        folder.write(index, map(other));
        run(&["ask", "--model", &model, "Hello"]).refuses(1, &[index, other]);
    }
    folder.write(index, "{\"weight_map\": {");
    run(&["ask", "--model", &model, "Hello"]).refuses(1, &[index, "not valid JSON"]);
    folder.write(index, "{}");
    run(&["ask", "--model", &model, "Hello"]).refuses(1, &[index, "weight_map"]);
}

#[test]
fn outputs_that_cannot_be_written() {
    let folder = Folder::new();
    let text = case(MODEL, "text-only");
    let inputs = text["inputs"].as_str().unwrap();
    let file = conversation_file(&folder, &text);
    let process = [
        "process",
        "--model",
        MODEL,
        "--conversation",
        &file,
        "--output",
    ];
    let forward = ["forward", "--model", MODEL, "--inputs", inputs, "--output"];
    let (place, missing) = (folder.path(""), folder.path("none/out.safetensors"));
    for command in [&process[..], &forward] {
        for (output, word) in [
            ("/dev/full", "no space left"),
            (&place, "is a directory"),
            (&missing, "create it first"),
        ] {
            run(&[command, &[output]].concat()).refuses(1, &["cannot write", word]);
        }
    }
    let left: Vec<_> = std::fs::read_dir(&place).unwrap().collect();
    assert_eq!(left.len(), 1, "only the conversation: {left:?}");
}

/// A limit on the size of files stands in for a full disk.
#[test]
fn nothing_half_written_is_left() {
    let folder = Folder::new();
    let text = case(MODEL, "text-only");
    let (inputs, out) = (
        text["inputs"].as_str().unwrap(),
        folder.path("out.safetensors"),
    );
    let mut command = std::process::Command::new("sh");
    // With the signal ignored the write fails instead.
    command.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""]);
    let lnv = lnv();
    command.arg(lnv.get_program()).current_dir(golden());
    let said = command
        .args([
            "forward", "--model", MODEL, "--inputs", inputs, "--output", &out,
        ])
        .output()
        .unwrap();
    Said::from(said).refuses(1, &["cannot write", "out.safetensors"]);
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), 0);
}

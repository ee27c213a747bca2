//! What the commands promise, against the goldens.

use std::process::Stdio;

use serde_json::Value;

use crate::support::{
    Folder, Said, Tensor, case, conversation_file, copy_of, golden, lnv, run, run_with_input,
    tensors,
};

const MODEL: &str = "llama-default";

/// The options of the command for what the reference's processor and `generate` were given.
fn options(kwargs: &Value) -> Vec<String> {
    let mut words = Vec::new();
    for (key, value) in kwargs.as_object().unwrap() {
        if !matches!(key.as_str(), "padding" | "do_sample") {
            words.push(format!("--{}", key.replace('_', "-")));
            words.push(value.to_string());
        }
    }
    words
}

fn run_all(words: &[&str], more: &[String]) -> Said {
    lnv().args(words).args(more).output().unwrap().into()
}

fn json(said: Said) -> Value {
    serde_json::from_str(&said.answer()).unwrap()
}

/// Largest difference, as a share of the largest value.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((&a.0, &a.1), (&b.0, &b.1));
    let largest = b.2.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    let pairs = a.2.iter().zip(&b.2);
    pairs.fold(0.0, |m: f64, (x, y)| m.max((x - y).abs())) / largest
}

/// Of a tensor [B, ..., S, W]: the rows where the mask is 1, from the end where it has fewer rows.
fn unmasked(tensor: &Tensor, mask: &Tensor) -> Tensor {
    let (dtype, shape, values) = tensor;
    let (batch, columns) = (mask.1[0], mask.1[1]);
    let (rows, width) = (shape[shape.len() - 2], shape[shape.len() - 1]);
    let heads = values.len() / (batch * rows * width);
    let mut kept = Vec::new();
    for (i, row) in values.chunks_exact(width).enumerate() {
        let (b, column) = (i / (heads * rows), columns - rows + i % rows);
        if mask.2[b * columns + column] == 1.0 {
            kept.extend_from_slice(row);
        }
    }
    (dtype.clone(), vec![kept.len()], kept)
}

#[test]
fn generate_gives_the_references_tokens_and_texts() {
    let folder = Folder::new();
    let rows = [
        ("one-image", "greedy"),
        ("one-video", "greedy"),
        ("mixed-turns", "beam3"),
        ("batch-kinds", "greedy"),
        ("batch-kinds", "beam3"),
        ("image-photo", "greedy-penalty"),
        ("video-fps", "greedy"),
        ("video-of-images", "greedy"),
        ("batch-texts", "beam2-penalty"),
    ];
    for (name, generation) in rows {
        let case = case(MODEL, name);
        let wanted = case["generate"].as_array().unwrap();
        let wanted = wanted.iter().find(|g| g["name"] == generation).unwrap();
        let mut more = options(&wanted["kwargs"]);
        let inputs = case["inputs"].as_str().unwrap();
        let common = [
            "generate", "--model", MODEL, "--dtype", "f32", "--format", "json",
        ];
        let given = run_all(&[&common[..], &["--inputs", inputs]].concat(), &more);
        more.extend(options(&case["processor_kwargs"]));
        let file = conversation_file(&folder, &case);
        let made = run_all(&[&common[..], &["--conversation", &file]].concat(), &more);
        for said in [given, made] {
            check(&json(said), wanted, &case, &format!("{name} {generation}"));
        }
    }
}

fn check(said: &Value, wanted: &Value, case: &Value, name: &str) {
    let sequences = said["sequences"].as_array().unwrap();
    let rows = wanted["new_ids"].as_array().unwrap();
    assert_eq!(sequences.len(), rows.len(), "{name}");
    for (ours, theirs) in sequences.iter().zip(rows) {
        let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
        assert_eq!(ours[..], theirs[..ours.len()], "{name}");
        assert!(
            theirs[ours.len()..].iter().all(|id| id == 0),
            "{name}: only padding is left out"
        );
    }
    assert_eq!(said["texts"], wanted["text_skip"], "{name}");
    let prompts = case["attention_mask"].as_array().unwrap().iter();
    let lengths = prompts.map(|row| row.as_array().unwrap().iter().filter(|m| **m == 1).count());
    let lengths: Vec<usize> = lengths.collect();
    assert_eq!(said["prompt_tokens"], serde_json::json!(lengths), "{name}");
    let reasons = said["finish_reasons"].as_array().unwrap();
    assert_eq!(reasons.len(), rows.len(), "{name}");
    assert!(
        reasons
            .iter()
            .all(|reason| reason == "stop" || reason == "length"),
        "{name}"
    );
    assert!(said["timings"]["prefill_s"].is_number(), "{name}");
}

#[test]
fn ask_streams_what_generate_writes() {
    let folder = Folder::new();
    let text = |question: &str| serde_json::json!({"type": "text", "text": question});
    let media = [
        serde_json::json!({"type": "video", "path": "media/clip-64x48.mp4"}),
        serde_json::json!({"type": "image", "path": "media/rgb-37x53.png"}),
    ];
    // The order of the options is the order of the media, which this template keeps.
    let model = copy_of(MODEL);
    model.write(
        "chat_template.jinja",
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}\
         {{ c.text if c.type == 'text' else '<' ~ c.type ~ '>' }} {% endfor %}{% endfor %}",
    );
    let model_path = model.path("");
    let orders = [
        (
            [
                "--video",
                "media/clip-64x48.mp4",
                "--image",
                "media/rgb-37x53.png",
            ],
            [0, 1],
        ),
        (
            [
                "--image",
                "media/rgb-37x53.png",
                "--video",
                "media/clip-64x48.mp4",
            ],
            [1, 0],
        ),
    ];
    let common = [
        "--model",
        &model_path,
        "--max-new-tokens",
        "12",
        "--num-frames",
        "4",
    ];
    let mut answers = Vec::new();
    for (options, order) in orders {
        let content = [&media[order[0]], &media[order[1]], &text("What is it?")];
        let system = serde_json::json!({"role": "system", "content": [text("Be brief.")]});
        let user = serde_json::json!({"role": "user", "content": content});
        let file = folder.write("c.json", serde_json::json!([system, user]).to_string());
        let generate = run(&[&["generate", "--conversation", &file], &common[..]].concat());
        let words = [&["ask", "--system", "Be brief."], &common[..], &options[..]].concat();
        let typed = run(&[&words[..], &["What is it?"]].concat());
        assert!(typed.err.contains("4 frames, 1 image"), "{}", typed.err);
        let typed = typed.answer();
        assert_eq!(typed, generate.answer());
        let piped = run_with_input(&[&words[..], &["-"]].concat(), b"What is it?\n");
        assert_eq!(piped.answer(), typed);
        answers.push(typed);
    }
    assert_ne!(answers[0], answers[1]);
}

/// `process` reads a clip whole; `generate` sees its first frames while the next are being decoded.
#[test]
fn frames_on_their_way_give_the_answer_of_a_clip_read_whole() {
    let folder = Folder::new();
    let media = golden().join("../media");
    let sound = std::fs::read(media.join("h264.mp4")).unwrap();
    // Its packets promise frames that cannot be decoded: the frames begin again, and so does the answer.
    let mut broken = sound.clone();
    broken[sound.len() / 4..][..sound.len() / 12].fill(0x5a);
    let broken = folder.write("broken.mp4", broken);
    let clip = |name: &str| media.join(name).to_str().unwrap().to_owned();
    let clips = ["h264.mp4", "vp9.webm", "h264.avi", "gif.gif"].map(clip);
    for clip in clips.iter().chain([&broken]) {
        let video = |path: &str| serde_json::json!({"type": "video", "path": path});
        // Of two clips the last one comes frame by frame.
        let content = [
            video("media/clip-64x48.mp4"),
            video(clip),
            serde_json::json!({"type": "text", "text": "What is it?"}),
        ];
        let user = serde_json::json!([{"role": "user", "content": content}]);
        let file = folder.write("c.json", user.to_string());
        let inputs = folder.path("inputs.safetensors");
        let how = ["--model", MODEL, "--num-frames", "8"];
        let asked = ["process", "--conversation", &file, "--output", &inputs];
        run(&[&asked[..], &how].concat()).answer();
        let how = [
            "--model",
            MODEL,
            "--max-new-tokens",
            "9",
            "--format",
            "json",
        ];
        let asked = ["generate", "--inputs", &inputs];
        let whole = json(run(&[&asked[..], &how].concat()));
        let asked = ["generate", "--conversation", &file, "--num-frames", "8"];
        let said = run(&[&asked[..], &how].concat());
        assert!(said.err.contains("16 frames"), "{}", said.err);
        let arriving = json(said);
        for key in ["sequences", "texts", "prompt_tokens"] {
            assert_eq!(arriving[key], whole[key], "{clip}");
        }
    }
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let folder = Folder::new();
    let case = case(MODEL, "one-image");
    let whole = case["generate"][0]["text_skip"][0].as_str().unwrap();
    let (before, _) = whole.split_once('T').unwrap();
    let file = conversation_file(&folder, &case);
    let words = [
        "generate",
        "--model",
        MODEL,
        "--dtype",
        "f32",
        "--conversation",
        &file,
    ];
    let words = [
        &words[..],
        &["--max-new-tokens", "16", "--stop", "T", "--format", "json"],
    ]
    .concat();
    let said = json(run(&words));
    assert_eq!(said["texts"][0], before);
    assert_eq!(said["finish_reasons"][0], "stop");
    let ask = [
        "ask",
        "--model",
        MODEL,
        "--image",
        "media/rgb-64x64.png",
        "--max-new-tokens",
        "16",
    ];
    let whole = run(&[&ask[..], &["Well?"]].concat()).answer();
    let middle = whole
        .trim_end()
        .char_indices()
        .map(|(i, _)| i)
        .nth(3)
        .unwrap();
    let stop: String = whole[middle..].chars().take(2).collect();
    let cut = run(&[&ask[..], &["--stop", &stop, "Well?"]].concat()).answer();
    let end = whole.find(&stop).unwrap();
    assert_eq!(cut.trim_end_matches('\n'), whole[..end].trim_end());
}

#[test]
fn samples_follow_the_seed() {
    let words = [
        "ask",
        "--model",
        MODEL,
        "--temperature",
        "1.5",
        "--max-new-tokens",
        "16",
    ];
    let ask = |seed: &str| run(&[&words[..], &["--seed", seed, "Hello"]].concat()).answer();
    assert_eq!(ask("7"), ask("7"));
    assert_ne!(ask("7"), ask("8"));
    // A temperature that would push every score to infinity is the best token, as near 0 it must be.
    let greedy = run(&["ask", "--model", MODEL, "--max-new-tokens", "8", "Hello"]).answer();
    let cold = [
        "ask",
        "--model",
        MODEL,
        "--max-new-tokens",
        "8",
        "--temperature",
        "1e-40",
    ];
    assert_eq!(run(&[&cold[..], &["Hello"]].concat()).answer(), greedy);
}

#[test]
fn process_writes_what_the_processor_returns() {
    let folder = Folder::new();
    for name in [
        "text-only",
        "one-image",
        "two-videos",
        "batch-kinds",
        "mixed-turns",
        "video-fps",
    ] {
        let case = case(MODEL, name);
        let file = conversation_file(&folder, &case);
        let out = folder.path("out.safetensors");
        let words = [
            "process",
            "--model",
            MODEL,
            "--conversation",
            &file,
            "--output",
            &out,
        ];
        let said = run_all(&words, &options(&case["processor_kwargs"]));
        assert_eq!(said.answer(), "");
        let ours = tensors(&out);
        let theirs = tensors(golden().join(case["inputs"].as_str().unwrap()));
        assert_eq!(
            ours.keys().collect::<Vec<_>>(),
            theirs.keys().collect::<Vec<_>>(),
            "{name}"
        );
        for (key, tensor) in &theirs {
            assert!(apart(&ours[key], tensor) < 1e-6, "{name}: {key}");
        }
    }
}

#[test]
fn forward_writes_what_the_model_returns() {
    let folder = Folder::new();
    for name in [
        "text-only",
        "mixed-turns",
        "batch-kinds",
        "labels-right-padded",
    ] {
        let case = case(MODEL, name);
        let (inputs, out) = (
            case["inputs"].as_str().unwrap(),
            folder.path("out.safetensors"),
        );
        let words = [
            "forward", "--model", MODEL, "--dtype", "f32", "--inputs", inputs, "--output", &out,
        ];
        let mask = &tensors(golden().join(inputs))["attention_mask"];
        run(&[&words[..], &["--hidden-states", "--attentions"]].concat()).answer();
        let ours = tensors(&out);
        let theirs = tensors(golden().join(case["outputs"].as_str().unwrap()));
        assert!(ours.contains_key("hidden_states.2") && ours.contains_key("attentions.1"));
        assert_eq!(ours["logits"].1, [mask.1[0], mask.1[1], 352], "{name}");
        for (key, tensor) in &theirs {
            let compared = match key.as_str() {
                "logits_tail" => apart(&tail(&ours["logits"], 8, mask), &unmasked(tensor, mask)),
                "logits_keep_3" => continue,
                key if key.starts_with("vision_") => continue,
                "loss" | "image_hidden_states" | "video_hidden_states" => apart(&ours[key], tensor),
                key => apart(&unmasked(&ours[key], mask), &unmasked(tensor, mask)),
            };
            assert!(compared < 1e-4, "{name}: {key} differs by {compared}");
        }
        let finite = ours
            .values()
            .flat_map(|(_, _, values)| values)
            .all(|x| x.is_finite());
        assert!(finite, "{name}: masked rows are finite too");
    }
}

/// The last `n` positions that the mask lets through.
fn tail(logits: &Tensor, n: usize, mask: &Tensor) -> Tensor {
    let (dtype, shape, values) = logits;
    let (rows, width) = (shape[1], shape[2]);
    let last = values
        .chunks_exact(rows * width)
        .flat_map(|row| &row[(rows - n) * width..]);
    let cut = (
        dtype.clone(),
        vec![shape[0], n, width],
        last.copied().collect(),
    );
    unmasked(&cut, mask)
}

#[test]
fn forward_keeps_as_many_logits_as_asked() {
    let folder = Folder::new();
    let case = case(MODEL, "text-only");
    let (inputs, out) = (
        case["inputs"].as_str().unwrap(),
        folder.path("out.safetensors"),
    );
    let words = [
        "forward", "--model", MODEL, "--dtype", "f32", "--inputs", inputs, "--output", &out,
    ];
    run(&[&words[..], &["--logits-to-keep", "3"]].concat()).answer();
    let theirs = tensors(golden().join(case["outputs"].as_str().unwrap()));
    assert!(apart(&tensors(&out)["logits"], &theirs["logits_keep_3"]) < 1e-4);
    for dtype in ["auto", "bf16", "f16"] {
        let words = [
            "forward", "--model", MODEL, "--inputs", inputs, "--output", &out,
        ];
        run(&[&words[..], &["--dtype", dtype]].concat()).answer();
        let away = apart(&tensors(&out)["logits"], &theirs["logits"]);
        assert!(away < 0.05, "{dtype}: {away}");
    }
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let text = run(&["inspect", "--model", MODEL]).answer();
    for word in ["llama", "F16", "parameters", "context", "memory"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let said = json(run(&["inspect", "--model", MODEL, "--format", "json"]));
    assert_eq!(
        said["architecture"],
        "LlavaNextVideoForConditionalGeneration"
    );
    assert_eq!(said["text"]["vocab_size"], 352);
    assert_eq!(said["image_token_id"], 348);
}

#[test]
fn bench_measures_what_it_promises() {
    let words = [
        "bench",
        "--synthetic",
        "tiny",
        "--frames",
        "1",
        "--steps",
        "2",
    ];
    let video = ["--video", "media/clip-64x48.mp4", "--format", "json"];
    let said = json(run(&[&words[..], &video].concat()));
    for key in [
        "load_s",
        "media_s",
        "vision_s",
        "prefill_s",
        "prefill_tokens",
        "decode_s",
        "first_token_s",
        "peak_gflops",
        "bandwidth_gbs",
        "vision_share",
        "prefill_share",
        "decode_share",
    ] {
        let value = said[key].as_f64().unwrap_or(-1.0);
        assert!(value > 0.0 && value.is_finite(), "{key}: {}", said[key]);
    }
    // 24 x 24 patches pooled by 2, and 40 tokens of text.
    assert_eq!(said["prefill_tokens"], 144 + 40);
}

#[test]
fn bench_compares_rows_and_contexts() {
    let words = "bench --synthetic tiny --text-layers 1 --frames 1 --steps 2 --format json";
    let words: Vec<&str> = words.split(' ').collect();
    let asked = ["--batch", "3", "--context", "64,320"];
    let said = json(run(&[&words[..], &asked].concat()));
    let rows = said["decode_rows"].as_array().unwrap();
    let seen: Vec<_> = rows.iter().map(|r| (&r["rows"], &r["context"])).collect();
    assert_eq!(
        format!("{seen:?}"),
        "[(Number(1), Number(64)), (Number(1), Number(320)), (Number(3), Number(64))]"
    );
    for (index, key) in ["gbs", "of_shorter_and_kv", "times_one_row"]
        .iter()
        .enumerate()
    {
        let value = rows[index][key].as_f64().unwrap_or(-1.0);
        assert!(value > 0.0 && value.is_finite(), "{key}: {}", rows[index]);
        assert!(
            rows[index]["share"]
                .as_f64()
                .is_some_and(|share| share > 0.0)
        );
    }
    assert_eq!(rows[1]["shorter_context"], 64);
    assert!(rows[0].get("times_one_row").is_none());
    assert_eq!(said["decode_batch"], 3);
    assert_eq!(said["decode_context"], 64);
    // More than any machine has.
    let asked = ["--batch", "1024", "--context", "1048576", "--model", MODEL];
    let said = run(&[&["bench", "--frames", "1", "--steps", "1"], &asked[..]].concat());
    said.refuses(1, &["1024 row(s) of 1048576 tokens", "smaller --batch"]);
}

#[test]
fn nobody_listening_is_no_bug() {
    let ask = ["ask", "--model", MODEL, "--max-new-tokens", "24", "Hello"];
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let said = lnv().args(ask).stdout(writer).output().unwrap();
    let said = Said::from(said);
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""));
    let full = || {
        std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let said: Said = lnv().args(ask).stdout(full()).output().unwrap().into();
    said.refuses(1, &["cannot write to stdout", "no space left"]);
    let said = lnv()
        .args(ask)
        .stderr(full())
        .stdout(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(0));
    assert!(!said.stdout.is_empty());
}

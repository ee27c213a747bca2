//! `lnv quantize` and `--quantize`: the same answers, nothing half-written, refusals in one sentence.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Folder, Said, case, copy_of, golden, lnv, run, tensors};

const MODEL: &str = "llama-default";

fn quantize(model: &str, format: &str, output: &str) -> Said {
    run(&[
        "quantize", "--model", model, "--to", format, "--output", output,
    ])
}

/// Everything in a folder, hidden files too.
fn left(folder: &Folder) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path("")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_saved_checkpoint_answers_as_quantising_while_loading_does() {
    let folder = Folder::new();
    for format in ["q8", "q4"] {
        let directory = folder.path(format);
        let said = quantize(MODEL, format, &directory);
        assert!(
            said.err.contains(&format!("in {format}: {directory}")),
            "{}",
            said.err
        );
        assert_eq!(said.answer(), "");
        let inputs = case(MODEL, "one-video")["inputs"]
            .as_str()
            .unwrap()
            .to_owned();
        let generate = |model: &str, more: &[&str]| {
            let words = ["generate", "--model", model, "--inputs", &inputs];
            let words = [
                &words[..],
                &["--max-new-tokens", "8", "--format", "json"],
                more,
            ];
            let said: Value = serde_json::from_str(&run(&words.concat()).answer()).unwrap();
            said["sequences"].clone()
        };
        let expected = generate(MODEL, &["--quantize", format]);
        assert_eq!(generate(&directory, &[]), expected);
        assert_eq!(
            generate(&directory, &["--quantize", format, "--dtype", "bf16"]),
            expected
        );
        let logits = |model: &str, more: &[&str]| {
            let out = folder.path("out.safetensors");
            let words = [
                "forward", "--model", model, "--inputs", &inputs, "--output", &out,
            ];
            run(&[&words[..], more].concat()).answer();
            tensors(&out)["logits"].clone()
        };
        assert_eq!(
            logits(&directory, &[]),
            logits(MODEL, &["--quantize", format])
        );
    }
}

/// A folder of the goldens of bitsandbytes' formats.
fn bitsandbytes(name: &str) -> String {
    format!("../bitsandbytes/{name}")
}

/// The same with the base's tokenizer and processor files beside it.
fn whole_bitsandbytes(name: &str, folder: &Folder) -> String {
    let path = folder.path(&format!("whole-{name}"));
    std::fs::create_dir(&path).unwrap();
    for source in ["base", name] {
        for entry in std::fs::read_dir(golden().join(bitsandbytes(source))).unwrap() {
            let entry = entry.unwrap();
            let target = format!("{path}/{}", entry.file_name().to_string_lossy());
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
    for other in ["batch.inputs.safetensors", "outputs.safetensors"] {
        std::fs::remove_file(format!("{path}/{other}")).unwrap();
    }
    path
}

#[test]
fn checkpoints_of_bitsandbytes_are_read_and_written() {
    let folder = Folder::new();
    let base = bitsandbytes("base");
    let inputs = bitsandbytes("base/batch.inputs.safetensors");
    let logits = |model: &str, more: &[&str]| {
        let out = folder.path("out.safetensors");
        let words = [
            "forward", "--model", model, "--inputs", &inputs, "--output", &out,
        ];
        run(&[&words[..], more].concat()).answer();
        tensors(&out)["logits"].clone()
    };
    let bf16 = ["--dtype", "bf16"];
    let nested = [
        "--compute-dtype",
        "bf16",
        "--double-quant",
        "--dtype",
        "bf16",
    ];
    let outliers = [
        "--int8-threshold",
        "1.5",
        "--skip-modules",
        "lm_head,v_proj",
    ];
    let outliers = [&outliers[..], &bf16].concat();
    let rows: [(&str, &str, &[&str]); 5] = [
        ("nf4", "nf4", &["--compute-dtype", "f16"]),
        ("nf4-nested", "nf4", &nested),
        ("fp4", "fp4", &["--dtype", "f32"]),
        ("int8", "int8", &[]),
        ("int8-outliers", "int8", &outliers),
    ];
    for (golden, format, options) in rows {
        // The checkpoint that Transformers wrote, quantising while loading, and writing: all the same.
        let transformers = whole_bitsandbytes(golden, &folder);
        let expected = logits(&transformers, &[]);
        let quantising = [&["--quantize", format][..], options].concat();
        assert_eq!(logits(&base, &quantising), expected, "{golden}");
        let written = folder.path(golden);
        let words = [
            "quantize", "--model", &base, "--to", format, "--output", &written,
        ];
        let said = run(&[&words[..], options].concat());
        assert!(said.err.contains(&format!("in {format}: ")), "{}", said.err);
        assert_eq!(said.answer(), "");
        assert_eq!(logits(&written, &[]), expected, "{golden}");
        assert_eq!(
            logits(&written, &["--quantize", format]),
            expected,
            "{golden}"
        );

        let facts = |model: &str, more: &[&str]| -> Value {
            let words = ["inspect", "--model", model, "--format", "json"];
            serde_json::from_str(&run(&[&words[..], more].concat()).answer()).unwrap()
        };
        let (own, theirs) = (facts(&written, &[]), facts(&transformers, &[]));
        assert_eq!(own["quantize"], format);
        assert_eq!(own["parameters"], theirs["parameters"]);
        for key in ["formats", "loaded_bytes", "dtype"] {
            assert_eq!(own[key], theirs[key], "{golden} {key}");
            assert_eq!(own[key], facts(&base, &quantising)[key], "{golden} {key}");
        }
    }
    let answer = [
        "ask",
        "--quantize",
        "nf4",
        "--max-new-tokens",
        "4",
        "Hello?",
    ];
    run(&answer).answer();
}

#[test]
fn bitsandbytes_settings_are_refused_where_they_have_no_effect() {
    let ask = |words: &[&'static str]| run(&[&["ask", "Hello"][..], words].concat());
    ask(&["--double-quant"]).refuses(1, &["--double-quant", "without --quantize"]);
    ask(&["--quantize", "q4", "--skip-modules", "a"]).refuses(1, &["--skip-modules", "q4"]);
    ask(&["--quantize", "int8", "--double-quant"]).refuses(1, &["--double-quant", "int8"]);
    ask(&["--quantize", "int8", "--compute-dtype", "f32"]).refuses(1, &["--compute-dtype"]);
    ask(&["--quantize", "nf4", "--int8-threshold", "6"]).refuses(1, &["--int8-threshold"]);
    ask(&["--quantize", "int8", "--int8-threshold", "-1"]).refuses(1, &["is -1", "0 or above"]);
    let model = bitsandbytes("nf4");
    let inspect = |words: &[&'static str]| {
        run(&[&["inspect", "--model", model.as_str()][..], words].concat())
    };
    inspect(&["--quantize", "fp4"]).refuses(1, &["nf4 already", "fp4"]);
    let folder = Folder::new();
    quantize(&model, "nf4", &folder.path("x")).refuses(1, &["nf4 already", "original"]);
}

#[test]
fn inspect_tells_formats_and_what_each_choice_takes() {
    let folder = Folder::new();
    let said = run(&["inspect", "--model", MODEL, "--format", "json"]).answer();
    let dense: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(dense["quantize"], Value::Null);
    let directory = folder.path("q4");
    quantize(MODEL, "q4", &directory).answer();
    let said = run(&["inspect", "--model", &directory, "--format", "json"]).answer();
    let packed: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(packed["quantize"], "q4");
    assert_eq!(packed["loaded_bytes"], dense["quantized_bytes"]["q4"]);
    assert_eq!(packed["loaded_bytes"], packed["file_bytes"]);
    assert!(packed["formats"].to_string().contains("q4"), "{packed}");
    let text = run(&["inspect", "--model", &directory]).answer();
    assert!(
        text.contains("decoder q4") && text.contains("vision tower q8"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_done_is_said_in_a_sentence() {
    let folder = Folder::new();
    let place = folder.path("");
    let full = folder.path("full");
    std::fs::create_dir(&full).unwrap();
    folder.write("full/note.txt", "keep me");
    let file = folder.write("file", "");
    let deep = folder.path("none/out");
    quantize(MODEL, "q8", &full).refuses(1, &["full is not empty"]);
    quantize(MODEL, "q8", &file).refuses(1, &["file is not a directory"]);
    quantize(MODEL, "q8", &deep).refuses(1, &["create it first"]);
    quantize(MODEL, "q8", "").refuses(2, &["--output"]);
    quantize("/nonexistent", "q8", &folder.path("x")).refuses(1, &["does not exist"]);
    quantize(MODEL, "q9", &folder.path("x")).refuses(2, &["q9", "q4"]);
    assert_eq!(left(&folder), ["file", "full"]);

    let directory = format!("{place}/q8");
    quantize(MODEL, "q8", &directory).answer();
    quantize(&directory, "q8", &folder.path("x")).refuses(1, &["q8 already", "original"]);
    quantize(&directory, "q4", &folder.path("x")).refuses(1, &["q8 already", "original"]);
    let ask = [
        "ask",
        "--model",
        &directory,
        "Hello",
        "--max-new-tokens",
        "2",
    ];
    let with = |words: &[&'static str]| run(&[&ask[..], words].concat());
    with(&["--quantize", "q4"]).refuses(1, &["q8 already", "--quantize"]);
    with(&["--dtype", "f32"]).refuses(1, &["bf16", "f32", "--dtype"]);
    with(&["--quantize", "q8"]).answer();
    let path = format!("{directory}/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["quantization_config"]["version"] = json!(7);
    std::fs::write(&path, config.to_string()).unwrap();
    with(&[]).refuses(1, &["quantization_config.version is 7", "version 3"]);
}

#[test]
fn an_empty_directory_is_filled_and_has_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let directory = folder.path("out");
    std::fs::create_dir(&directory).unwrap();
    let usual = std::fs::metadata(&directory).unwrap().permissions().mode();
    quantize(MODEL, "q8", &directory).answer();
    let found = std::fs::metadata(&directory).unwrap().permissions().mode();
    assert_eq!(found, usual);
    assert_eq!(left(&folder), ["out"]);
}

/// A limit on the size of files stands in for a full disk.
#[test]
fn a_full_disk_leaves_nothing() {
    let folder = Folder::new();
    let mut command = Command::new("sh");
    // With the signal ignored the write fails instead.
    command.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\""]);
    command.arg(lnv().get_program()).current_dir(golden());
    let out = folder.path("out");
    let words = ["quantize", "--model", MODEL, "--to", "q8", "--output", &out];
    let said = Said::from(command.args(words).output().unwrap());
    said.refuses(1, &["cannot write", &format!("{out}/"), "too large"]);
    assert_eq!(left(&folder), Vec::<String>::new());
}

/// A checkpoint whose embeddings take long enough to be interrupted.
fn large_checkpoint() -> Folder {
    const ROWS: usize = 1 << 18;
    let folder = copy_of(MODEL);
    let path = folder.path("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let names = ["embed_tokens.weight", "lm_head.weight"];
    let is_table = |name: &str| names.iter().any(|table| name.ends_with(table));
    let mut width = 0;
    let mut tables = Vec::new();
    let mut views = Vec::new();
    for (name, view) in read.tensors() {
        if is_table(&name) {
            width = view.shape()[1];
            tables.push(name);
        } else {
            views.push((name, view));
        }
    }
    let noise: Vec<u8> = (0..ROWS * width)
        .flat_map(|i| half_bits(i).to_le_bytes())
        .collect();
    for name in tables {
        let shape = vec![ROWS, width];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F16, shape, &noise);
        views.push((name, view.unwrap()));
    }
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::File::create(&path)
        .unwrap()
        .write_all(&bytes)
        .unwrap();
    let path = folder.path("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["text_config"]["vocab_size"] = json!(ROWS);
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

/// Half-precision numbers between 0.03 and 0.06 of either sign.
fn half_bits(i: usize) -> u16 {
    let spread = (i as u16).wrapping_mul(40_503);
    0x2800 | (spread & 0x83ff)
}

#[test]
fn ctrl_c_leaves_nothing() {
    let (model, folder) = (large_checkpoint(), Folder::new());
    let out = folder.path("out");
    let place = model.path("");
    let words = [
        "quantize", "--model", &place, "--to", "q4", "--output", &out,
    ];
    let mut child = lnv()
        .args(words)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    // Once its temporary directory is there it listens.
    while left(&folder).is_empty() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let killed = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    child.wait().unwrap();
    let said = Said::from(child.wait_with_output().unwrap());
    said.refuses(1, &["stopped", "nothing was written"]);
    assert_eq!(left(&folder), Vec::<String>::new());
}

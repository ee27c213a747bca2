//! Random scores, greedy choice: whatever comes out to its end is JSON of the shape that was asked for.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use llava_next_video::processor::tokenizer::Tokenizer;
use serde_json::Map;

use super::*;

/// Llama's BPE with byte fallback, two ways to mark spaces; a unigram model; Qwen2's bytes.
const TOKENIZERS: [&str; 4] = [
    "llama-default",
    "siglip-full",
    "longrope-layer-list",
    "qwen2-windows",
];

fn file(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::read(root.join(name)).unwrap()
}

fn tokenizer(name: &str) -> (JsonGrammars, Tokenizer, u32) {
    let bytes = file(&format!("testdata/golden/{name}/tokenizer.json"));
    let tokenizer = Tokenizer::from_parts(&bytes, &Map::new(), &Map::new(), name).unwrap();
    let ends = ["</s>", "<|im_end|>", "<|endoftext|>"];
    let ends: Vec<u32> = ends
        .iter()
        .filter_map(|text| tokenizer.token_to_id(text))
        .collect();
    let end = ends[0];
    (JsonGrammars::new(&bytes, &ends).unwrap(), tokenizer, end)
}

/// Numbers that look random, the same each time.
struct Dice(u64);

impl Dice {
    fn score(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }
}

/// The text of one answer, and whether it came to its end.
fn answer(
    constraints: &dyn Constraints,
    tokenizer: &Tokenizer,
    end: u32,
    dice: &mut Dice,
) -> (String, bool) {
    let mut constraint = constraints.begin();
    let mut ids = Vec::new();
    // More scores than ids, as models have whose vocabulary was padded.
    let size = tokenizer.vocab_size() + 77;
    for _ in 0..300 {
        let mut scores: Vec<f32> = (0..size).map(|_| dice.score()).collect();
        // Random texts would rarely end otherwise.
        scores[end as usize] += 0.5;
        constraint.restrict(&mut scores).unwrap();
        let best = (0..size)
            .max_by(|a, b| scores[*a].total_cmp(&scores[*b]))
            .unwrap();
        assert!(
            scores[best].is_finite(),
            "nothing may come next after {ids:?}"
        );
        let best = best as u32;
        constraint.accept(best).unwrap();
        let ends = tokenizer
            .id_to_token(best)
            .is_some_and(|text| ["</s>", "<|im_end|>", "<|endoftext|>"].contains(&text.as_str()));
        if ends {
            return (tokenizer.decode(&ids, true, Some(false)).unwrap(), true);
        }
        ids.push(best);
    }
    (tokenizer.decode(&ids, true, Some(false)).unwrap(), false)
}

/// Whether `value` is as `schema` says, for the words that the schemas below use.
fn fits(value: &Value, schema: &Value, root: &Value) -> bool {
    if let Some(target) = schema["$ref"].as_str() {
        return fits(
            value,
            root.pointer(target.trim_start_matches('#')).unwrap(),
            root,
        );
    }
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().any(|schema| fits(value, schema, root));
    }
    let listed = schema["enum"].as_array();
    if listed.is_some_and(|listed| !listed.contains(value)) {
        return false;
    }
    if !schema["const"].is_null() && schema["const"] != *value {
        return false;
    }
    let kind = schema["type"].as_str();
    let least = |name: &str| schema[name].as_f64().unwrap_or(f64::MIN);
    let most = |name: &str| schema[name].as_f64().unwrap_or(f64::MAX);
    let between = |n: f64, low: &str, high: &str| n >= least(low) && n <= most(high);
    match value {
        Value::Null => matches!(kind, None | Some("null")),
        Value::Bool(_) => matches!(kind, None | Some("boolean")),
        Value::Number(n) => {
            let n = n.as_f64().unwrap();
            let whole = kind != Some("integer") || n.fract() == 0.0;
            matches!(kind, None | Some("number" | "integer"))
                && whole
                && between(n, "minimum", "maximum")
        }
        Value::String(text) => {
            let length = text.chars().count() as f64;
            matches!(kind, None | Some("string")) && between(length, "minLength", "maxLength")
        }
        Value::Array(items) => {
            matches!(kind, None | Some("array"))
                && between(items.len() as f64, "minItems", "maxItems")
                && items
                    .iter()
                    .all(|item| schema["items"].is_null() || fits(item, &schema["items"], root))
        }
        Value::Object(fields) => {
            let known = |name: &String| !schema["properties"][name].is_null();
            let required = schema["required"].as_array().into_iter().flatten();
            matches!(kind, None | Some("object"))
                && required
                    .map(|name| name.as_str().unwrap())
                    .all(|name| fields.contains_key(name))
                && (schema["additionalProperties"] != false || fields.keys().all(known))
                && fields.iter().all(|(name, field)| {
                    !known(name) || fits(field, &schema["properties"][name], root)
                })
        }
    }
}

fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        (
            "enum",
            json!({
                "type": "object",
                "properties": { "colour": { "type": "string", "enum": ["red", "dark blue", "grün", "日本", "\"q\"\n"] } },
                "required": ["colour"],
                "additionalProperties": false
            }),
        ),
        (
            "nested",
            json!({
                "type": "object",
                "properties": {
                    "scene": {
                        "type": "object",
                        "properties": {
                            "count": { "type": "integer", "minimum": 0, "maximum": 20 },
                            "speed": { "type": "number", "minimum": -1.5, "maximum": 2.5 },
                            "seen": { "type": "boolean" },
                            "note": { "anyOf": [{ "type": "null" }, { "type": "string", "maxLength": 8 }] }
                        },
                        "required": ["count", "speed", "seen", "note"],
                        "additionalProperties": false
                    }
                },
                "required": ["scene"],
                "additionalProperties": false
            }),
        ),
        (
            "array",
            json!({
                "type": "array",
                "items": { "type": "string", "minLength": 1, "maxLength": 5 },
                "minItems": 1,
                "maxItems": 4
            }),
        ),
        (
            "unicode",
            json!({
                "type": "object",
                "properties": { "größe – 大きさ": { "type": "string", "maxLength": 6 } },
                "required": ["größe – 大きさ"],
                "additionalProperties": false
            }),
        ),
        (
            "refs",
            json!({
                "$defs": {
                    "shape": {
                        "type": "object",
                        "properties": {
                            "kind": { "const": "circle" },
                            "inside": { "type": "array", "items": { "$ref": "#/$defs/shape" }, "maxItems": 1 }
                        },
                        "required": ["kind", "inside"],
                        "additionalProperties": false
                    }
                },
                "type": "object",
                "properties": { "first": { "$ref": "#/$defs/shape" } },
                "required": ["first"],
                "additionalProperties": false
            }),
        ),
        (
            "a number",
            json!({ "type": "integer", "minimum": 100, "maximum": 999 }),
        ),
        ("one of constants", json!({ "enum": [null, true, 7, "x"] })),
    ]
}

#[test]
fn answers_keep_to_their_schema() {
    for name in TOKENIZERS {
        let (grammars, tokenizer, end) = tokenizer(name);
        for (what, schema) in schemas() {
            let constraints = grammars.schema(&schema, true).unwrap();
            let mut ended = 0;
            for seed in 1..=12u64 {
                let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let (text, done) = answer(constraints.as_ref(), &tokenizer, end, &mut dice);
                if !done {
                    continue;
                }
                ended += 1;
                let value: Value = serde_json::from_str(&text)
                    .unwrap_or_else(|cause| panic!("{name}, {what}: {text:?}: {cause}"));
                assert!(fits(&value, &schema, &schema), "{name}, {what}: {text}");
            }
            assert!(
                ended >= 6,
                "{name}, {what}: {ended} of 12 came to their end"
            );
        }
    }
}

#[test]
fn any_object_is_an_object() {
    for name in TOKENIZERS {
        let (grammars, tokenizer, end) = tokenizer(name);
        let constraints = grammars.object().unwrap();
        let mut ended = 0;
        for seed in 1..=30u64 {
            let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (text, done) = answer(constraints.as_ref(), &tokenizer, end, &mut dice);
            if done {
                ended += 1;
                match serde_json::from_str::<Value>(&text) {
                    Ok(value) => assert!(value.is_object(), "{name}: {text}"),
                    // JSON sets numbers no bounds, this reader does.
                    Err(cause) => assert!(cause.to_string().contains("out of range"), "{text}"),
                }
            }
        }
        assert!(ended > 0, "{name}");
    }
}

#[test]
fn the_answers_of_one_request_do_not_disturb_each_other() {
    let (grammars, tokenizer, end) = tokenizer("llama-default");
    let schema = json!({ "enum": ["ab", "cd"] });
    let constraints = grammars.schema(&schema, true).unwrap();
    let mut first = constraints.begin();
    let mut second = constraints.begin();
    let words = token_bytes(
        &file("testdata/golden/llama-default/tokenizer.json"),
        &[end],
    )
    .unwrap();
    let id = |byte: u8| words.iter().position(|word| *word == [byte]).unwrap() as u32;
    let (quote, a, b, c) = (id(b'"'), id(b'a'), id(b'b'), id(b'c'));
    first.accept(quote).unwrap();
    first.accept(a).unwrap();
    second.accept(quote).unwrap();
    second.accept(c).unwrap();
    let mut scores = vec![0.0; tokenizer.vocab_size()];
    first.restrict(&mut scores).unwrap();
    assert!(scores[b as usize] == 0.0 && scores[end as usize].is_infinite());
    assert!(second.accept(b).is_err());
}

#[test]
fn the_ways_that_tokenizers_spell() {
    let (_, tokenizer, _) = tokenizer("llama-default");
    let words = token_bytes(&file("testdata/golden/llama-default/tokenizer.json"), &[2]).unwrap();
    let word = |text: &str| words[tokenizer.token_to_id(text).unwrap() as usize].clone();
    assert_eq!(word("▁"), b" ");
    assert_eq!(word("<0xE2>"), [0xe2]);
    // What has a token of its own is written with that one, the rest with the byte's.
    for byte in 0..0xffu8 {
        let id = tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
        let own = char::from(byte).to_string().replace(' ', "▁");
        let own = tokenizer.token_to_id(&own).filter(|_| byte.is_ascii());
        let word = &words[id as usize];
        assert_eq!(word.is_empty(), own.is_some(), "{byte}");
        assert_eq!(words[own.unwrap_or(id) as usize], [byte]);
    }
    assert_eq!(word("<0xFF>"), b"");
    assert_eq!(word("</s>")[0], TokTrie::SPECIAL_TOKEN_MARKER);
    let bytes = stand_ins();
    assert_eq!((bytes[&'Ġ'], bytes[&'Ċ'], bytes[&'a']), (b' ', b'\n', b'a'));
    assert_eq!(bytes.len(), 256);
}

#[test]
fn a_model_without_the_signs_says_so() {
    let bytes = file("crates/llava-next-video/demo/tokenizer.json");
    let grammars = JsonGrammars::new(&bytes, &[2]).unwrap();
    let error = grammars.object().err().unwrap();
    assert!(
        error.to_string().contains("no words for JSON's signs"),
        "{error}"
    );
    for broken in ["", "[]", "{}", "{\"model\":{\"vocab\":{\"a\":99999999}}}"] {
        assert!(
            JsonGrammars::new(broken.as_bytes(), &[2]).is_err(),
            "{broken}"
        );
    }
    assert!(JsonGrammars::new(&bytes, &[]).is_err());
}

#[test]
fn schemas_that_cannot_be_are_refused_in_a_sentence_and_soon() {
    let (grammars, ..) = tokenizer("llama-default");
    let long = "a".repeat(MAX_SCHEMA_BYTES);
    let mut deep = json!({ "type": "string" });
    for _ in 0..60 {
        deep = json!({ "type": "array", "items": { "anyOf": [deep, { "type": "null" }] } });
    }
    let doubling: Vec<Value> = (0..40)
        .map(|at| {
            let next = format!("#/$defs/{}", at + 1);
            json!({ "allOf": [{ "$ref": next }, { "$ref": next }] })
        })
        .chain([json!({ "type": "string" })])
        .collect();
    let doubling: Map<String, Value> = doubling
        .into_iter()
        .enumerate()
        .map(|(at, schema)| (at.to_string(), schema))
        .collect();
    // Refused, or compiled: but soon, and without a panic.
    let either = [
        deep,
        json!({ "$defs": doubling, "$ref": "#/$defs/0" }),
        json!({ "type": "string", "pattern": "^(((a{1,100}){1,100}){1,100}){1,100}$" }),
        json!({ "type": "string", "pattern": "^(a|aa|aaa)*(b|bb)*(?:.{0,200}){200}$" }),
        json!({ "type": "string", "minLength": 4000, "maxLength": 4096 }),
        json!({ "type": "array", "items": { "type": "array", "maxItems": 4096 }, "minItems": 4096 }),
        json!({ "$ref": "#" }),
        json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/a" } } }),
        json!({ "allOf": [{ "$ref": "#" }] }),
        json!({ "type": "object", "x-guidance": { "whitespace_pattern": "(a{9999}){9999}" } }),
    ];
    for schema in either {
        let begun = Instant::now();
        let _ = grammars.schema(&schema, true);
        assert!(
            begun.elapsed() < COMPILE + Duration::from_secs(1),
            "{schema}"
        );
    }
    for schema in [
        json!(null),
        json!("object"),
        json!(false),
        json!([]),
        json!({ "type": "banana" }),
        json!({ "type": "string", "pattern": "(" }),
        json!({ "type": "string", "pattern": long[..1000] }),
        json!({ "description": long }),
        json!({ "type": "string", "maxLength": 1e9 }),
        json!({ "type": "array", "items": { "type": "array", "minItems": 100_000 } }),
        json!({ "$ref": "http://127.0.0.1/schema.json" }),
        json!({ "$ref": "file:///etc/passwd" }),
        json!({ "$ref": "#/$defs/none" }),
        json!({ "type": "integer", "minimum": 5, "maximum": 4 }),
        json!({ "enum": [] }),
        json!({ "type": "object", "not": { "required": ["a"] } }),
    ] {
        let error = grammars.schema(&schema, true).err();
        let error = error
            .unwrap_or_else(|| panic!("{schema} was taken"))
            .to_string();
        assert!(
            error.len() < 400 && !error.contains('\n'),
            "{schema}: {error}"
        );
        assert!(!error.contains("panic"), "{schema}: {error}");
    }
    // What cannot be kept to is passed over where that was asked for.
    assert!(
        grammars
            .schema(
                &json!({ "type": "object", "not": { "required": ["a"] } }),
                false
            )
            .is_ok()
    );
    assert!(grammars.schema(&json!(true), true).is_ok());
}

//! The server as clients use it: the built binary with the built-in model, on a free port of loopback.

#[cfg(target_os = "linux")]
mod decoders;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::served::{Answered, Served, about, content, data_uri, demo};
use crate::support::{golden, run};

/// The events of a stream, the last of which is `[DONE]`.
fn events(text: &str) -> Vec<Value> {
    let data = text.split("\n\n").filter_map(|e| e.strip_prefix("data: "));
    let mut data: Vec<&str> = data.collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    let read = |e: &str| serde_json::from_str(e).unwrap_or_else(|_| panic!("{e}"));
    data.into_iter().map(read).collect()
}

#[test]
fn answers_are_those_of_the_command_whole_and_streamed() {
    let server = Served::start(&[]);
    for (file, question) in [
        ("circle.png", "Describe the image."),
        ("left.mp4", "Which way does it move?"),
        ("left.mp4", "Describe the video."),
    ] {
        let kind = if file.ends_with(".mp4") {
            "--video"
        } else {
            "--image"
        };
        let path = golden().join("../demo").join(file);
        let alone = run(&["ask", kind, path.to_str().unwrap(), question]).answer();
        let mut body = about(file, question);
        let whole = server.chat(&body);
        assert_eq!(content(&whole, 0), alone.trim());
        let whole = whole.json();
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert_eq!(whole["object"], "chat.completion");

        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let streamed = events(&server.chat(&body).text);
        let delta = |e: &Value| e["choices"][0]["delta"].clone();
        assert_eq!(delta(&streamed[0])["role"], "assistant");
        let texts = streamed.iter().map(delta);
        let text: String = texts
            .filter_map(|d| d["content"].as_str().map(str::to_owned))
            .collect();
        assert_eq!(text, alone.trim());
        let last = &streamed[streamed.len() - 1];
        assert_eq!(last["choices"], json!([]));
        assert_eq!(
            last["usage"]["completion_tokens"],
            whole["usage"]["completion_tokens"]
        );
        let before = &streamed[streamed.len() - 2];
        assert_eq!(before["choices"][0]["finish_reason"], "stop");
        assert_eq!(before["usage"], Value::Null);
    }
}

/// The first to ask about a clip sees its frames as they are decoded; the others get it whole.
#[test]
fn a_clip_is_answered_the_same_on_its_way_and_whole() {
    let media = golden().join("../media");
    let folder = crate::support::Folder::new();
    let sound = std::fs::read(media.join("h264.mp4")).unwrap();
    // Its packets promise frames that cannot be decoded: its frames begin again.
    let mut broken = sound.clone();
    broken[sound.len() / 4..][..sound.len() / 12].fill(0x5a);
    let clips = [
        ("broken.mp4", broken),
        ("h264.mp4", sound),
        ("h264.avi", std::fs::read(media.join("h264.avi")).unwrap()),
    ];
    let server = Served::start(&["--log-format", "json"]);
    let mut told = Vec::new();
    for (name, bytes) in clips {
        let path = folder.write(name, &bytes);
        let question = "Which way does it move?";
        let alone = run(&["ask", "--video", &path, question]).answer();
        let url = format!("data:video/mp4;base64,{}", BASE64_STANDARD.encode(&bytes));
        let part = json!({"type": "video_url", "video_url": {"url": url}});
        let text = json!({"type": "text", "text": question});
        let body = json!({"messages": [{"role": "user", "content": [part, text]}]});
        let encoded = server.metric("lnv_features_encoded_total");
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..4).map(|_| scope.spawn(|| server.chat(&body))).collect();
            for answer in asked {
                let answer = answer.join().unwrap();
                assert_eq!(content(&answer, 0), alone.trim(), "{name}");
                told.push((
                    answer.id.clone().unwrap(),
                    answer.json()["usage"]["prompt_tokens"].clone(),
                ));
            }
        });
        let questions = json!({"video": {"url": url}, "questions": [question, question]});
        let answers = server.post("/v1/videos/questions", &questions).json();
        for index in 0..2 {
            assert_eq!(answers["data"][index]["answer"], alone.trim(), "{name}");
        }
        // Each frame is seen once, however it came; those of the broken one that did not count too.
        let encoded = server.metric("lnv_features_encoded_total") - encoded;
        assert!(encoded <= 16.0, "{name}: {encoded}");
    }
    // A question that was asked anew counts once in its request's line.
    server.signal("TERM");
    let (_, err) = server.end();
    for (id, prompt_tokens) in told {
        let line = err.lines().find(|line| line.contains(&id)).unwrap();
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["prompt_tokens"], prompt_tokens);
    }
    // The first to ask may also ask many questions.
    let server = Served::start(&[]);
    let url = data_uri("left.mp4");
    let body = json!({"video": {"url": url}, "questions": ["Which way does it move?"]});
    let answer = server.post("/v1/videos/questions", &body).json();
    assert_eq!(answer["data"][0]["answer"], "left");
}

/// The engine has seen frames by then and holds what it made of them.
#[test]
fn a_clip_that_breaks_off_midway_is_refused_and_leaves_nothing() {
    let server = Served::start(&[]);
    let frame = |name: &str| {
        let bytes = std::fs::read(golden().join("../media").join(name)).unwrap();
        BASE64_STANDARD.encode(bytes)
    };
    let sound = vec![frame("444-64x64.jpg"); 8];
    let body = |frames: &[String], stream: bool| {
        let url = format!("data:video/jpeg;base64,{}", frames.join(","));
        let part = json!({"type": "video_url", "video_url": {"url": url}});
        let text = json!({"type": "text", "text": "Which way does it move?"});
        json!({"messages": [{"role": "user", "content": [part, text]}], "stream": stream})
    };
    let mut other = sound.clone();
    other[6] = frame("444-61x45.jpg");
    let mut torn = sound.clone();
    let half = torn[6].len() / 8 * 4;
    torn[6].truncate(half);
    for (frames, reason) in [(other, "not of one size"), (torn, "damaged or cut off")] {
        for stream in [false, true] {
            let answer = server.chat(&body(&frames, stream));
            assert_eq!(answer.status, 400, "{}", answer.text);
            let error = &answer.json()["error"];
            assert_eq!(error["code"], "invalid_media", "{error}");
            assert!(
                error["message"].as_str().unwrap().contains(reason),
                "{error}"
            );
        }
    }
    assert!(server.metric("lnv_features_encoded_total") > 0.0);
    let late = Instant::now() + Duration::from_secs(10);
    while server.metric("lnv_cache_blocks_in_use") > 0.0 {
        assert!(Instant::now() < late, "blocks are left");
    }
    let answer = server.chat(&body(&sound, false));
    assert!(!content(&answer, 0).is_empty());
}

#[test]
fn lengths_stops_and_several_answers() {
    let server = Served::start(&[]);
    let mut body = about("circle.png", "Describe the image.");
    body["max_tokens"] = json!(2);
    let short = server.chat(&body);
    assert_eq!(short.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(short.json()["usage"]["completion_tokens"], 2);
    body["max_tokens"] = json!(50);
    body["stop"] = json!(["circle on", "zebra"]);
    let stopped = server.chat(&body);
    assert_eq!(content(&stopped, 0), "a red");
    body["stream"] = json!(true);
    let streamed = server.chat(&body).text;
    assert!(!streamed.contains("circle"), "{streamed}");
    let mut body = about("circle.png", "Describe the image.");
    body["n"] = json!(3);
    let several = server.chat(&body);
    let all = several.json()["choices"].as_array().unwrap().len();
    assert_eq!(all, 3);
    assert_eq!(content(&several, 0), content(&several, 2));
    body["temperature"] = json!(1.5);
    body["seed"] = json!(5);
    let drawn = server.chat(&body).json()["choices"].clone();
    assert_eq!(server.chat(&body).json()["choices"], drawn);
    body["stream"] = json!(true);
    let mut texts = [const { String::new() }; 3];
    for event in events(&server.chat(&body).text) {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or("");
    }
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(drawn[index]["message"]["content"], *text);
    }
}

#[test]
fn log_probabilities_are_those_of_the_text() {
    let server = Served::start(&[]);
    let mut body = about("circle.png", "Describe the image.");
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    let whole = server.chat(&body).json();
    let choice = &whole["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let text: String = tokens
        .iter()
        .map(|t| t["token"].as_str().unwrap())
        .collect();
    assert_eq!(text.trim(), choice["message"]["content"]);
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        // Greedy: the token is the likeliest.
        assert_eq!(top[0]["token"], token["token"]);
    }
    body["stream"] = json!(true);
    let mut streamed = Vec::new();
    for event in events(&server.chat(&body).text) {
        let told = event["choices"][0]["logprobs"]["content"]
            .as_array()
            .cloned();
        streamed.extend(told.unwrap_or_default());
    }
    assert_eq!(&streamed, tokens);
}

#[test]
fn a_file_that_was_sent_is_shown_and_asked_about() {
    let server = Served::start(&[]);
    let clip = demo("left.mp4");
    let sent = server.send("/v1/media?num_frames=4", "video/mp4", &clip);
    assert_eq!(sent.status, 200, "{}", sent.text);
    let sent = sent.json();
    assert_eq!(sent["kind"], "video");
    let frames = sent["frames"].as_array().unwrap();
    assert_eq!(frames.len(), 4);
    assert!(frames[1]["time_s"].as_f64().unwrap() > 0.0);
    let picture = frames[0]["thumbnail"].as_str().unwrap();
    assert!(picture.starts_with("data:image/jpeg;base64,"));
    let id = sent["id"].as_str().unwrap();
    let again = server.get(&format!("/v1/media/{id}?num_frames=8")).json();
    assert_eq!(again["frames"].as_array().unwrap().len(), 8);
    assert_eq!(
        again["tokens"].as_u64(),
        sent["tokens"].as_u64().map(|n| 2 * n)
    );
    let body = json!({"messages": [{"role": "user", "content": [
        {"type": "video_url", "video_url": {"url": id}},
        {"type": "text", "text": "Which way does it move?"},
    ]}]});
    assert_eq!(content(&server.chat(&body), 0), "left");
    // The bytes decide where the type says nothing.
    let sent = server.send("/v1/media", "application/octet-stream", &demo("circle.png"));
    assert_eq!(sent.json()["kind"], "image");
    server
        .send("/v1/media", "video/mp4", b"no clip")
        .refuses(400, Some("file"));
    server
        .send("/v1/media", "video/mp4", b"")
        .refuses(400, Some("file"));
    let clip = server
        .send("/v1/media", "video/mp4", &demo("left.mp4"))
        .json();
    assert!(clip["max_frames"].as_u64() <= clip["total_frames"].as_u64());
    let (id, most) = (clip["id"].as_str().unwrap(), &clip["max_frames"]);
    let look = |n: u64| server.get(&format!("/v1/media/{id}?num_frames={n}"));
    assert_eq!(look(most.as_u64().unwrap()).status, 200);
    look(most.as_u64().unwrap() + 1).refuses(400, Some("num_frames"));
    let kept = server.metric("lnv_upload_bytes");
    server
        .send("/v1/media", "video/mp4", &[7; 5000])
        .refuses(400, Some("file"));
    assert_eq!(server.metric("lnv_upload_bytes"), kept);
    let unknown = format!("/v1/media/media:{}", "0".repeat(64));
    server.get(&unknown).refuses(404, Some("id"));
}

#[test]
fn many_questions_about_one_clip_share_it() {
    let server = Served::start(&[]);
    let asked = [
        "Which way does it move?",
        "What colour is it?",
        "What happens?",
    ];
    let body = json!({"video": {"url": data_uri("left.mp4")}, "questions": asked});
    let answer = server.post("/v1/videos/questions", &body);
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let said = answer["data"].as_array().unwrap().iter();
    let said: Vec<&str> = said.map(|a| a["answer"].as_str().unwrap()).collect();
    assert_eq!(said, ["left", "red", "it moves to the left"]);
    let cached = &answer["data"][1]["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64().unwrap() > 0, "{answer}");
}

#[test]
fn many_questions_take_one_place_and_are_all_answered_by_a_server_that_stops() {
    let server = Served::start(&["--max-waiting", "1"]);
    let asked = vec!["Describe the video."; 40];
    let body = json!({"video": {"url": data_uri("left.mp4")}, "questions": asked});
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.post("/v1/videos/questions", &body));
        let until = Instant::now() + Duration::from_secs(30);
        while server.metric("lnv_requests_answered_total") < 2.0 {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(1));
        }
        server.signal("TERM");
        answer.join().unwrap()
    });
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let data = answer["data"].as_array().unwrap();
    assert_eq!(data.len(), asked.len());
    for said in data {
        let said = said["answer"].as_str().unwrap();
        assert!(said.contains("moves to the left"), "{said}");
    }
}

#[test]
fn progress_and_timings_are_told_where_asked_for() {
    let server = Served::start(&[]);
    let mut body = about("circle.png", "What shape is it?");
    body["stream"] = json!(true);
    body["lnv"] = json!({"progress": true});
    let streamed = events(&server.chat(&body).text);
    for stage in ["media", "vision", "prefill"] {
        assert!(
            streamed.iter().any(|e| e["lnv"]["stage"] == stage),
            "{stage}"
        );
    }
    let last = streamed.last().unwrap();
    assert!(last["lnv"]["timings"]["prefill_s"].as_f64().unwrap() > 0.0);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let streamed = events(&server.chat(&body).text);
    let tokens = |event: &Value| event["usage"]["completion_tokens"].as_u64();
    let so_far: Vec<u64> = streamed.iter().filter_map(tokens).collect();
    assert_eq!(so_far.len(), streamed.len(), "each chunk tells it");
    assert!(so_far[0] == 0 && so_far.is_sorted(), "{so_far:?}");
    let usage = streamed.iter().map(|event| &event["usage"]);
    let whole = usage
        .clone()
        .find(|usage| usage.get("prompt_tokens_details").is_some());
    let whole = whole.unwrap();
    assert_eq!(so_far.last().copied(), whole["completion_tokens"].as_u64());
    assert!(
        usage
            .into_iter()
            .all(|usage| usage["prompt_tokens"] == whole["prompt_tokens"])
    );
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    let server = Served::start(&["--max-body-mib", "1", "--max-frames", "16"]);
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let image = |url: &str| user(json!([{"type": "image_url", "image_url": {"url": url}}]));
    let with = |key: &str, value: Value| {
        let mut body = user(json!("Hello"));
        body[key] = value;
        body
    };
    let rows = [
        (json!([]), 400, None),
        (json!({}), 400, Some("messages")),
        (with("model", json!("gpt-4")), 404, Some("model")),
        (with("model", json!(4)), 400, Some("model")),
        (with("temperature", json!("hot")), 400, Some("temperature")),
        (
            with("max_tokens", json!(1_u64 << 40)),
            400,
            Some("max_tokens"),
        ),
        (with("n", json!(0)), 400, Some("n")),
        (
            image("data:image/png;base64,AAAA"),
            400,
            Some("messages[0].content[0].image_url"),
        ),
        (
            image("ftp://127.0.0.1/a.png"),
            400,
            Some("messages[0].content[0].image_url"),
        ),
        (
            image("file:///etc/passwd"),
            400,
            Some("messages[0].content[0].image_url"),
        ),
        (
            image("http://127.0.0.1:1/a.png"),
            400,
            Some("messages[0].content[0].image_url"),
        ),
        // The built-in model has no words for braces.
        (
            with("response_format", json!({"type": "json_object"})),
            400,
            Some("response_format"),
        ),
        (user(json!("<image>")), 400, None),
        (user(json!("word ".repeat(10_000))), 400, Some("messages")),
        (user(json!("x".repeat(2 << 20))), 413, None),
    ];
    for (body, status, param) in rows {
        let answer = server.chat(&body);
        answer.refuses(status, param);
        assert!(answer.id.is_some());
    }
    let questions = |body: Value| server.post("/v1/videos/questions", &body);
    questions(json!({"questions": ["a"]})).refuses(400, Some("video"));
    let url = "data:video/mp4;base64,AAAA";
    questions(json!({"video": url})).refuses(400, Some("questions"));
    questions(json!({"video": url, "questions": ["a", 1]})).refuses(400, Some("questions[1]"));
    questions(json!({"video": url, "questions": ["a"], "stream": true}))
        .refuses(400, Some("stream"));
    for body in [&b""[..], b"{", b"\xff\xfe", b"{\"messages\": NaN}"] {
        let answer = server.send("/v1/chat/completions", "application/json", body);
        answer.refuses(400, None);
    }
    server.get("/nothing").refuses(404, None);
    server.get("/v1/models/other").refuses(404, Some("model"));
    server.get("/v1/chat/completions").refuses(405, None);
    server
        .get("/v1/media/media:00?num_frames=x")
        .refuses(400, Some("num_frames"));
    server.get("/v1/media/none").refuses(404, Some("id"));
    let said = {
        server.signal("TERM");
        server.end()
    };
    assert_eq!(said.0, Some(0), "{}", said.1);
    assert!(!said.1.contains("bug of its own"), "{}", said.1);
}

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let server = Served::start(&["--api-key", "secret", "--served-model-name", "mine"]);
    let body = json!({"messages": [{"role": "user", "content": "Hello"}]});
    server.chat(&body).refuses(401, None);
    server.get("/v1/models").refuses(401, None);
    for path in ["/health", "/ready", "/openapi.json", "/", "/metrics"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let with = |key: &str| {
        let request = Served::agent().get(format!("{}/v1/models", server.url));
        Served::answered(request.header("Authorization", key).call())
    };
    with("Bearer other").refuses(401, None);
    with("secret").refuses(401, None);
    let models = with("Bearer secret").json();
    assert_eq!(models["data"][0]["id"], "mine");
    let foreign = Served::agent().get(format!("{}/v1/models", server.url));
    let foreign = foreign
        .header("Authorization", "Bearer secret")
        .header("Origin", "https://example.org");
    Served::answered(foreign.call()).refuses(403, None);
}

#[test]
fn another_name_that_leads_here_is_not_answered() {
    let ask = |server: &Served, host: &str| {
        let request = Served::agent().get(format!("{}/v1/models", server.url));
        let request = request.header("Host", host);
        let origin = format!("http://{host}");
        Served::answered(request.header("Origin", &origin).call())
    };
    let server = Served::start(&["--allow-host", "own.example"]);
    let message = ask(&server, "evil.example").refuses(403, None);
    assert!(message.contains("--allow-host"), "{message}");
    assert_eq!(ask(&server, "own.example").status, 200);
    assert_eq!(ask(&server, "localhost").status, 200);
}

#[test]
fn a_client_that_vanishes_is_cancelled() {
    let server = Served::start(&[]);
    let mut body = about("circle.png", "Describe the image.");
    body["stream"] = json!(true);
    let body = body.to_string();
    for _ in 0..4 {
        let mut stream = server.connect();
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        drop(stream);
    }
    // A sender that stops in the middle of its body.
    let mut half = server.connect();
    write!(
        half,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{"
    )
    .unwrap();
    drop(half);
    let until = Instant::now() + Duration::from_secs(20);
    while server.metric("lnv_connections ") > 1.0 {
        assert!(Instant::now() < until, "connections stay open");
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = server.chat(&about("circle.png", "What shape is it?"));
    assert_eq!(content(&answer, 0), "circle");
}

#[test]
fn too_many_at_once_are_told_to_come_again() {
    let server = Served::start(&["--max-connections", "2"]);
    let held = [server.connect(), server.connect()];
    std::thread::sleep(Duration::from_millis(200));
    let answer = server.get("/health");
    answer.refuses(429, None);
    assert!(answer.retry_after.is_some());
    drop(held);
    let until = Instant::now() + Duration::from_secs(10);
    while server.get("/health").status != 200 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_full_line_turns_away_and_answers_the_others() {
    let server = Served::start(&["--max-waiting", "1"]);
    let body = about("left.mp4", "Describe the video.");
    let answers: Vec<Answered> = std::thread::scope(|scope| {
        let ask = || server.chat(&body);
        let asked: Vec<_> = (0..24).map(|_| scope.spawn(ask)).collect();
        asked.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut turned_away = 0;
    for answer in &answers {
        if answer.status == 429 {
            turned_away += 1;
            answer.refuses(429, None);
            assert!(answer.retry_after.is_some());
        } else {
            assert!(content(answer, 0).contains("moves to the left"));
        }
    }
    assert!(turned_away < answers.len());
    assert_eq!(server.chat(&body).status, 200);
}

#[test]
fn a_server_that_is_told_to_stop_answers_what_runs() {
    let server = Served::start(&[]);
    let body = about("left.mp4", "Describe the video.").to_string();
    let ask = |part: &str| {
        let mut stream = server.connect();
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{part}",
            body.len()
        )
        .unwrap();
        stream
    };
    let mut whole = ask(&body);
    let (first, second) = body.split_at(body.len() / 2);
    let mut late = ask(first);
    std::thread::sleep(Duration::from_millis(300));
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(200));
    // Its body was not there when the server was told to stop.
    late.write_all(second.as_bytes()).unwrap();
    let mut text = String::new();
    whole.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(text.contains("moves to the left"), "{text}");
    text.clear();
    late.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 503"), "{text}");
    assert!(text.contains("retry-after"), "{text}");
    let refused = TcpStream::connect(server.url.trim_start_matches("http://"));
    assert!(refused.is_err());
    let (status, err) = server.end();
    assert_eq!(status, Some(0), "{err}");
    assert!(
        err.contains("status=200") && err.contains("status=503"),
        "{err}"
    );
}

/// A picture of 8K in one colour as a data URI of some 100 KB.
fn large_picture(colour: u8) -> String {
    let picture = image::RgbImage::from_pixel(7680, 4320, image::Rgb([colour, 0, 0]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    format!(
        "data:image/png;base64,{}",
        BASE64_STANDARD.encode(bytes.into_inner())
    )
}

fn of_pictures(urls: &[&String]) -> Value {
    let part = |url: &&String| json!({"type": "image_url", "image_url": {"url": url}});
    let mut parts: Vec<Value> = urls.iter().map(part).collect();
    parts.push(json!({"type": "text", "text": "What shape is it?"}));
    json!({"max_tokens": 1, "messages": [{"role": "user", "content": parts}]})
}

#[test]
fn decoded_media_have_one_budget_however_many_are_named() {
    let server = Served::start(&["--decode-memory-mib", "800", "--media-cache-mib", "0"]);
    let peak = || server.metric("process_resident_memory_peak_bytes") / f64::from(1 << 20);
    let before = peak();
    let (red, black) = (large_picture(255), large_picture(0));
    // One decoded picture has 95 MiB.
    let answer = server.chat(&of_pictures(&[&red; 10]));
    assert!(matches!(answer.status, 200 | 400), "{}", answer.text);
    assert_eq!(server.metric("lnv_media_misses_total"), 1.0);
    assert!(peak() - before < 300.0, "{} MiB more", peak() - before);
    let body = of_pictures(&[&red, &black, &red, &black]);
    let answers: Vec<Answered> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(|| server.chat(&body))).collect();
        asked.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for answer in answers {
        assert!(matches!(answer.status, 200 | 400), "{}", answer.text);
    }
    assert!(peak() - before < 900.0, "{} MiB more", peak() - before);
}

#[test]
fn every_request_has_its_line_and_its_figures() {
    let server = Served::start(&["--log-format", "json"]);
    let answer = server.chat(&about("circle.png", "What shape is it?"));
    let id = answer.id.clone().unwrap();
    assert_eq!(content(&answer, 0), "circle");
    assert_eq!(server.metric("lnv_time_to_first_token_seconds_count"), 1.0);
    let status =
        "lnv_request_duration_seconds_count{route=\"/v1/chat/completions\",status=\"200\"}";
    assert_eq!(server.metric(status), 1.0);
    assert!(server.metric("process_resident_memory_bytes") > 1e6);
    server.signal("TERM");
    let (status, err) = server.end();
    assert_eq!(status, Some(0));
    let line = err.lines().find(|line| line.contains(&id)).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["status"], 200);
    assert_eq!(line["pictures"], 1);
    for key in [
        "prompt_tokens",
        "new_tokens",
        "prefill_s",
        "total_s",
        "client",
        "model",
    ] {
        assert!(!line[key].is_null(), "{key}: {line}");
    }
}

#[test]
fn features_on_disk_are_found_by_the_next_server() {
    let directory = tempfile::tempdir().unwrap();
    let words = ["--feature-cache", directory.path().to_str().unwrap()];
    let ask = |server: &Served| {
        let questions = [
            ("left.mp4", "Which way does it move?"),
            ("circle.png", "Describe the image."),
        ];
        questions.map(|(file, question)| content(&server.chat(&about(file, question)), 0))
    };
    let first = Served::start(&words);
    let answers = ask(&first);
    let encoded = first.metric("lnv_features_encoded");
    assert!(encoded > 0.0);
    assert_eq!(first.metric("lnv_features_read"), 0.0);
    first.signal("TERM");
    assert_eq!(first.end().0, Some(0));
    let files = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(files as f64, encoded);
    let next = Served::start(&words);
    assert_eq!(ask(&next), answers);
    assert_eq!(next.metric("lnv_features_encoded"), 0.0);
    assert_eq!(next.metric("lnv_features_read"), encoded);
}

#[test]
fn the_description_names_every_address_and_no_other() {
    let server = Served::start(&[]);
    let document = server.get("/openapi.json").json();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace("{id}", "x");
        for method in operations.as_object().unwrap().keys() {
            let answer = match method.as_str() {
                "get" => server.get(&path),
                _ => server.send(&path, "application/json", b"{}"),
            };
            let known = answer.status != 405 && answer.json_code() != Some("not_found".into());
            assert!(known, "{method} {path}: {}", answer.text);
        }
    }
}

#[test]
fn nonsense_on_the_command_line_is_refused_before_anything_is_loaded() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    run(&["serve", "--port", &port]).refuses(1, &["cannot listen on", &port, "--port"]);
    run(&["serve", "--port", "0", "--max-frames", "0"]).refuses(1, &["--max-frames is 0"]);
    run(&["serve", "--port", "0", "--api-key", ""]).refuses(1, &["API key"]);
    run(&["serve", "--host", "nowhere"]).refuses(2, &["--host"]);
    // What a prompt takes is known only with the model; it is refused, not raised in silence.
    run(&["serve", "--port", "0", "--kv-cache-mib", "1"])
        .refuses(1, &["--kv-cache-mib is 1", "give at least"]);
}

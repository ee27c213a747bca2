//! A server under test: the built binary with the built-in model, on a free port of loopback, and what it answers.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::support::{golden, lnv};

/// A server that ends with the test.
pub struct Served {
    pub child: Child,
    pub url: String,
    /// What it said on stderr, in the end.
    err: Option<std::thread::JoinHandle<String>>,
}

/// An answer: status, headers that matter, body.
pub struct Answered {
    pub status: u16,
    pub retry_after: Option<String>,
    pub id: Option<String>,
    pub text: String,
}

impl Answered {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("{}", self.text))
    }

    /// A refusal in OpenAI's form.
    pub fn refuses(&self, status: u16, param: Option<&str>) -> String {
        assert_eq!(self.status, status, "{}", self.text);
        let error = &self.json()["error"];
        assert_eq!(error["param"].as_str(), param, "{}", self.text);
        assert!(error["type"].is_string(), "{}", self.text);
        assert!(error["code"].is_string() || error["code"].is_null());
        error["message"].as_str().unwrap().to_owned()
    }

    /// The refusal's word for programs.
    pub fn json_code(&self) -> Option<String> {
        let value: Value = serde_json::from_str(&self.text).ok()?;
        Some(value["error"]["code"].as_str()?.to_owned())
    }
}

impl Served {
    pub fn start(words: &[&str]) -> Self {
        Self::start_with(words, &[])
    }

    /// The same with more in its environment.
    pub fn start_with(words: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut child = lnv()
            .args(["serve", "--port", "0"])
            .args(words)
            .envs(environment.iter().copied())
            .env_remove("LNV_API_KEY")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let err = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        let Some(at) = line.find("http://") else {
            panic!("{line}: {}", err.join().unwrap());
        };
        Self {
            child,
            url: line[at..].trim().to_owned(),
            err: Some(err),
        }
    }

    pub fn agent() -> ureq::Agent {
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(120)))
            .build()
            .into()
    }

    pub fn answered(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answered {
        let mut response = response.unwrap();
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        Answered {
            status: response.status().as_u16(),
            retry_after: header("retry-after"),
            id: header("x-request-id"),
            text: response.body_mut().read_to_string().unwrap(),
        }
    }

    pub fn get(&self, path: &str) -> Answered {
        Self::answered(Self::agent().get(format!("{}{path}", self.url)).call())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answered {
        self.send(path, "application/json", body.to_string().as_bytes())
    }

    pub fn send(&self, path: &str, kind: &str, body: &[u8]) -> Answered {
        let request = Self::agent().post(format!("{}{path}", self.url));
        Self::answered(request.content_type(kind).send(body))
    }

    pub fn chat(&self, body: &Value) -> Answered {
        self.post("/v1/chat/completions", body)
    }

    /// A request written by hand, on a connection of its own.
    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(self.url.trim_start_matches("http://")).unwrap()
    }

    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text;
        let line = text.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let killed = std::process::Command::new("kill")
            .args([&format!("-{name}"), &pid])
            .status();
        assert!(killed.unwrap().success());
    }

    /// Waits for its end; gives its status and what it said.
    pub fn end(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap().code();
        (status, self.err.take().unwrap().join().unwrap())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn demo(file: &str) -> Vec<u8> {
    std::fs::read(golden().join("../demo").join(file)).unwrap()
}

pub fn data_uri(file: &str) -> String {
    let kind = match file.ends_with(".mp4") {
        true => "video/mp4",
        false => "image/png",
    };
    format!("data:{kind};base64,{}", BASE64_STANDARD.encode(demo(file)))
}

pub fn about(file: &str, question: &str) -> Value {
    let part = match file.ends_with(".mp4") {
        true => json!({"type": "video_url", "video_url": {"url": data_uri(file)}}),
        false => json!({"type": "image_url", "image_url": {"url": data_uri(file)}}),
    };
    json!({"messages": [{"role": "user", "content": [
        part, {"type": "text", "text": question},
    ]}]})
}

pub fn content(answer: &Answered, index: usize) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text);
    let message = &answer.json()["choices"][index]["message"];
    assert_eq!(message["role"], "assistant");
    message["content"].as_str().unwrap().to_owned()
}

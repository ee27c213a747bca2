//! Running the binary, reading the goldens, and a server on loopback.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// The folder that the goldens' paths are relative to; every command runs there.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden")
}

/// What a command said.
pub struct Said {
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// The answer of a command that must succeed.
    pub fn answer(self) -> String {
        assert_eq!(self.status, Some(0), "{}", self.err);
        assert!(!self.err.contains("error: "), "{}", self.err);
        self.out
    }

    /// One sentence with these words, nothing on stdout, no panic.
    pub fn refuses(&self, status: i32, words: &[&str]) {
        let Self { err, out, .. } = self;
        assert_eq!(self.status, Some(status), "{err}");
        assert_eq!(out, "", "stdout carries answers only");
        assert!(
            !err.contains("panicked") && !err.contains("backtrace"),
            "{err}"
        );
        assert!(!err.contains("bug of its own"), "{err}");
        let errors = err.lines().filter(|line| line.starts_with("error: "));
        assert_eq!(errors.count(), 1, "{err}");
        if status == 1 {
            let other = |line: &&str| !line.starts_with("error: ") && !line.starts_with("note: ");
            assert_eq!(err.lines().find(other), None, "more than a sentence: {err}");
        }
        for word in words {
            assert!(err.contains(word), "{word:?} is not in: {err}");
        }
    }
}

/// The command, in the goldens' folder and cut off from hub, caches and proxies.
pub fn lnv() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lnv"));
    command
        .current_dir(golden())
        .stdin(Stdio::null())
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .env("HF_HOME", "/nonexistent")
        .env("RUST_BACKTRACE", "1");
    for name in [
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "LNV_LOG",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_SDK_DISABLED",
    ] {
        command.env_remove(name);
    }
    command
}

/// Runs `lnv` with words.
pub fn run(words: &[&str]) -> Said {
    lnv().args(words).output().unwrap().into()
}

/// Runs `lnv` with text on stdin.
pub fn run_with_input(words: &[&str], input: &[u8]) -> Said {
    let mut child = lnv()
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command that refuses its options reads nothing.
    let _ = stdin.write_all(input);
    drop(stdin);
    child.wait_with_output().unwrap().into()
}

/// A folder for a test's files.
pub struct Folder(pub TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

/// The files of a checkpoint, without its cases.
pub fn checkpoint_files(model: &str) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(golden().join(model)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.contains("puts.safetensors") && name != "cases.json" {
            files.push((name, std::fs::read(path).unwrap()));
        }
    }
    files
}

/// A copy of a checkpoint to damage.
pub fn copy_of(model: &str) -> Folder {
    let folder = Folder::new();
    for (name, bytes) in checkpoint_files(model) {
        folder.write(&name, bytes);
    }
    folder
}

/// A case of a configuration's `cases.json`.
pub fn case(model: &str, name: &str) -> Value {
    let text = std::fs::read_to_string(golden().join(model).join("cases.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let cases = json["cases"].as_array().unwrap();
    cases.iter().find(|c| c["name"] == name).unwrap().clone()
}

/// The case's conversations as a file for `--conversation`.
pub fn conversation_file(folder: &Folder, case: &Value) -> String {
    let conversations = match case["batched"] == true {
        true => &case["conversations"],
        false => &case["conversations"][0],
    };
    folder.write("conversation.json", conversations.to_string())
}

/// A tensor: type, shape, values.
pub type Tensor = (String, Vec<usize>, Vec<f64>);

/// The tensors of a file.
pub fn tensors(path: impl AsRef<Path>) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let data = view.data();
        let values = match view.dtype() {
            safetensors::Dtype::I64 => data
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
                .collect(),
            _ => data
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
        };
        let dtype = format!("{:?}", view.dtype());
        (name, (dtype, view.shape().to_vec(), values))
    };
    file.tensors().into_iter().map(read).collect()
}

/// What a server does with a request: method-and-path line and the `Range` header, answered on the stream.
pub type Handler = dyn Fn(&str, Option<&str>, &mut TcpStream) + Send + Sync;

/// A server on loopback that notes what was asked for.
pub struct Server {
    pub url: String,
    pub seen: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(handler: Box<Handler>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, handler) = (Arc::clone(&seen), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, handler) = (Arc::clone(&log), Arc::clone(&handler));
                std::thread::spawn(move || serve(stream, &log, handler.as_ref().as_ref()));
            }
        });
        Self { url, seen }
    }
}

/// One request a connection.
fn serve(mut stream: TcpStream, log: &Mutex<Vec<String>>, handler: &Handler) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request)) = lines.next() else {
        return;
    };
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    for line in lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
    {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: ") {
            range = Some(value.to_owned());
        }
    }
    let entry = format!("{path} {}", range.as_deref().unwrap_or("-"));
    log.lock().unwrap().push(entry);
    handler(&path, range.as_deref(), &mut stream);
    let _ = stream.flush();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // A close with unread bytes would reset the connection and lose the answer.
    let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(200)));
    let _ = stream.read(&mut [0; 64]);
}

/// Writes an answer; `sent` of the body's bytes, then the connection ends.
pub fn respond(stream: &mut TcpStream, head: &str, body: &[u8], sent: usize) {
    let length = body.len();
    let head = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body[..sent.min(length)]);
}

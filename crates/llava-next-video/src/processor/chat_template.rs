//! Conversations to prompts: Jinja chat templates rendered as Transformers renders them.
//!
//! Decision: `minijinja` with Transformers' settings (block trimming, loop controls, `raise_exception`,
//! `strftime_now`, its own `tojson`, Python's string methods, Python's way of printing values) and
//! `{% generation %}` blocks, rewritten before parsing into blocks that note where they begin and end. The
//! template shipped with a checkpoint always wins; where there is none, one of three built-in ones
//! (vicuna, mistral, ChatML) is chosen and [`ChatTemplates::note`] says so.
//!
//! Templates come with checkpoints and are not trusted: instructions, recursion and output are bounded, and
//! nothing outside the conversation can be reached. The clock of `strftime_now` is UTC.
//!
//! Refuses: `include` and `import` (there is nothing to load from), templates that do not end.

mod builtin;
mod python;

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde_json::{Map, Value};

use super::conversation::{Content, Message};
use super::tokenizer::{Tokenizer, object};
use crate::config::CheckpointFiles;
use crate::error::{Error, Result};

pub use builtin::Family;

/// Instructions that one rendering may take.
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may produce.
const MAX_RENDERED_BYTES: usize = 64 << 20;
/// Depth of calls and blocks.
const MAX_DEPTH: usize = 100;

/// What `apply_chat_template` takes besides the conversation.
#[derive(Debug, Clone, Default)]
pub struct TemplateOptions {
    /// End with the words that make the assistant speak.
    pub add_generation_prompt: bool,
    /// Cut the prompt after the last text of the last message, to be continued.
    pub continue_final_message: bool,
    /// Note which characters lie in `{% generation %}` blocks.
    pub return_assistant_spans: bool,
    /// Which of several templates; `None` is the one called `default`.
    pub template: Option<String>,
    /// JSON schemas of tools.
    pub tools: Option<Value>,
    /// Documents for templates that know them.
    pub documents: Option<Value>,
    /// Further variables.
    pub variables: Map<String, Value>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The prompt.
    pub text: String,
    /// Ranges of characters (not bytes) that the assistant says, where they were asked for.
    pub assistant_spans: Vec<Range<usize>>,
}

/// The chat templates of a checkpoint.
#[derive(Debug, Clone)]
pub struct ChatTemplates {
    named: Vec<(String, ChatTemplate)>,
    /// What a person should know: that a built-in template stands in.
    pub note: Option<String>,
}

impl ChatTemplates {
    /// Reads, in this order, `chat_template.jinja` with `additional_chat_templates/*.jinja`,
    /// `chat_template.json`, and the `chat_template` of `processor_config.json` and
    /// `tokenizer_config.json`; else takes the built-in template for `text_model_type`.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that cannot be parsed.
    pub fn from_files(
        files: &CheckpointFiles,
        tokenizer: &Tokenizer,
        text_model_type: &str,
    ) -> Result<Self> {
        let mut named = Vec::new();
        if let Some(source) = files.read_text("chat_template.jinja")? {
            named.push((
                "default".to_owned(),
                files.display("chat_template.jinja"),
                source,
            ));
        }
        for file in additional_templates(files)? {
            let name = file
                .trim_start_matches(ADDITIONAL)
                .trim_end_matches(".jinja")
                .to_owned();
            if let Some(source) = files.read_text(&file)? {
                named.push((name, files.display(&file), source));
            }
        }
        for file in [
            "chat_template.json",
            "processor_config.json",
            "tokenizer_config.json",
        ] {
            if named.is_empty() {
                let name = files.display(file);
                let sources = named_sources(object(files, file)?.get("chat_template"), &name)?;
                named.extend(
                    sources
                        .into_iter()
                        .map(|(key, source)| (key, name.clone(), source)),
                );
            }
        }
        let mut note = None;
        if named.is_empty() {
            let family = Family::guess(text_model_type, tokenizer);
            note = Some(format!(
                "{} has no chat template; the built-in {family} template is used",
                files.name()
            ));
            named.push((
                "default".into(),
                format!("the built-in {family} template"),
                family.source().into(),
            ));
        }
        let named = named
            .into_iter()
            .map(|(key, file, source)| Ok((key, ChatTemplate::new(&source, &file)?)))
            .collect::<Result<_>>()?;
        Ok(Self { named, note })
    }

    /// One template, as `default`.
    pub fn single(template: ChatTemplate) -> Self {
        Self {
            named: vec![("default".into(), template)],
            note: None,
        }
    }

    /// The template called `name`, or the default one.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn get(&self, name: Option<&str>) -> Result<&ChatTemplate> {
        let wanted = name.unwrap_or("default");
        if let Some((_, template)) = self.named.iter().find(|(name, _)| name == wanted) {
            return Ok(template);
        }
        let names: Vec<_> = self.named.iter().map(|(name, _)| name.as_str()).collect();
        Err(Error::Template(format!(
            "there is no chat template called {wanted}: this checkpoint has {}",
            names.join(", ")
        )))
    }
}

const ADDITIONAL: &str = "additional_chat_templates/";

/// Paths of the additional templates, sorted.
fn additional_templates(files: &CheckpointFiles) -> Result<Vec<String>> {
    let mut found: Vec<String> = match files {
        CheckpointFiles::Embedded(files) => {
            files.iter().map(|(name, _)| (*name).to_owned()).collect()
        }
        CheckpointFiles::Directory(directory) => {
            match std::fs::read_dir(directory.join(ADDITIONAL)) {
                Err(_) => vec![],
                Ok(entries) => entries
                    .filter_map(|entry| {
                        Some(format!("{ADDITIONAL}{}", entry.ok()?.file_name().to_str()?))
                    })
                    .collect(),
            }
        }
    };
    found.retain(|name| name.starts_with(ADDITIONAL) && name.ends_with(".jinja"));
    found.sort();
    Ok(found)
}

/// A `chat_template` setting: a string, or a list or object of named ones.
fn named_sources(value: Option<&Value>, file: &str) -> Result<Vec<(String, String)>> {
    let wrong = || {
        Error::Config(format!(
            "{file}: chat_template must be a string or a list of {{\"name\", \"template\"}} objects"
        ))
    };
    match value {
        None | Some(Value::Null) => Ok(vec![]),
        Some(Value::String(source)) => Ok(vec![("default".into(), source.clone())]),
        Some(Value::Array(list)) => list
            .iter()
            .map(|entry| {
                let part = |key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                part("name").zip(part("template")).ok_or_else(wrong)
            })
            .collect(),
        Some(Value::Object(object)) => object
            .iter()
            .map(|(name, source)| Ok((name.clone(), source.as_str().ok_or_else(wrong)?.to_owned())))
            .collect(),
        Some(_) => Err(wrong()),
    }
}

/// One parsed template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    name: String,
}

impl ChatTemplate {
    /// Parses `source`; `name` stands for it in messages.
    ///
    /// # Errors
    /// The template is not valid Jinja.
    pub fn new(source: &str, name: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_DEPTH);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python::format);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", python::strftime_now);
        environment
            .add_template_owned("chat", mark_generation_blocks(source))
            .map_err(|cause| {
                Error::Template(format!(
                    "{name} is not a valid chat template: {}",
                    explain(&cause)
                ))
            })?;
        Ok(Self {
            environment: Arc::new(environment),
            name: name.into(),
        })
    }

    /// The prompt of a conversation; `special_tokens` become variables.
    ///
    /// # Errors
    /// The template refuses the conversation, fails, or does not end; options that contradict each other.
    pub fn render(
        &self,
        messages: &[Message],
        special_tokens: &Map<String, Value>,
        options: &TemplateOptions,
    ) -> Result<Rendered> {
        if options.continue_final_message && options.add_generation_prompt {
            return Err(Error::Input(
                "continue_final_message and add_generation_prompt exclude each other: the first lets the model go on \
                 with the last message, the second starts a new one"
                    .into(),
            ));
        }
        if options.continue_final_message && options.return_assistant_spans {
            return Err(Error::Input(
                "continue_final_message and the assistant mask exclude each other: ask for one"
                    .into(),
            ));
        }
        let mut variables = options.variables.clone();
        variables.insert(
            "messages".into(),
            messages.iter().map(Message::to_template).collect(),
        );
        variables.insert("tools".into(), options.tools.clone().unwrap_or_default());
        variables.insert(
            "documents".into(),
            options.documents.clone().unwrap_or_default(),
        );
        variables.insert(
            "add_generation_prompt".into(),
            options.add_generation_prompt.into(),
        );
        for (name, token) in special_tokens {
            variables.insert(name.clone(), token.clone());
        }
        let marks = options
            .return_assistant_spans
            .then(|| unused_marks(&variables));
        let [begin, end] = marks.map_or(["".into(), "".into()], |marks| marks.map(String::from));
        variables.insert(BEGIN.into(), begin.into());
        variables.insert(END.into(), end.into());
        let text = self.run(&variables)?;
        let (mut text, assistant_spans) = match marks {
            Some(marks) => take_marks(&text, marks),
            None => (text, vec![]),
        };
        if options.continue_final_message {
            cut_after_final_message(&mut text, messages)?;
        }
        Ok(Rendered {
            text,
            assistant_spans,
        })
    }

    fn run(&self, variables: &Map<String, Value>) -> Result<String> {
        let failed = |cause: &minijinja::Error| {
            Error::Template(match refusal(cause) {
                Some(words) => format!("the chat template refuses this conversation: {words}"),
                None => format!(
                    "{} cannot render this conversation: {}",
                    self.name,
                    explain(cause)
                ),
            })
        };
        let template = self
            .environment
            .get_template("chat")
            .map_err(|cause| failed(&cause))?;
        let mut out = Bounded(Vec::new());
        template
            .render_captured_to(Jinja::from_serialize(variables), &mut out)
            .map_err(|cause| failed(&cause))?;
        String::from_utf8(out.0)
            .map_err(|_| Error::Template(format!("{} wrote text that is not UTF-8", self.name)))
    }
}

/// An output that refuses to grow without end.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(std::io::Error::other(format!(
                "the prompt grows beyond {MAX_RENDERED_BYTES} bytes"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The words of `raise_exception`, carried through the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(words: &str) -> Result<String, minijinja::Error> {
    Err(
        minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
            .with_source(Refusal(words.into())),
    )
}

/// The words of `raise_exception`, if that is what happened.
fn refusal(error: &minijinja::Error) -> Option<&str> {
    let mut cause: &dyn std::error::Error = error;
    loop {
        if let Some(refusal) = cause.downcast_ref::<Refusal>() {
            return Some(&refusal.0);
        }
        cause = cause.source()?;
    }
}

/// One line on what went wrong and where.
fn explain(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("it does not end within {FUEL} steps");
    }
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let cause =
        std::error::Error::source(error).map_or_else(String::new, |cause| format!(" ({cause})"));
    match error.line() {
        Some(line) => format!("{what}{cause}, in line {line}"),
        None => format!("{what}{cause}"),
    }
}

const BEGIN: &str = "__generation_begin";
const END: &str = "__generation_end";

/// Rewrites `{% generation %}` and `{% endgeneration %}`, which the engine does not know, into a scope that
/// writes a mark at both ends. Tags stay where they were, so white space around them is trimmed as before.
fn mark_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some((open, word, close, after)) = bare_tag(rest) else {
            out.push_str("{%");
            rest = &rest[2..];
            continue;
        };
        match word {
            "generation" => {
                out += &format!("{{%{open} with %}}{{{{ {BEGIN} }}}}{{% if true {close}%}}")
            }
            "endgeneration" => {
                out += &format!("{{%{open} endif %}}{{{{ {END} }}}}{{% endwith {close}%}}")
            }
            _ => out.push_str(&rest[..rest.len() - after.len()]),
        }
        rest = after;
    }
    out + rest
}

/// A tag of a single word at the start of `text`: its left sign, the word, its right sign, what follows.
fn bare_tag(text: &str) -> Option<(&str, &str, &str, &str)> {
    let inner = text.strip_prefix("{%")?;
    let end = inner.find("%}")?;
    let (tag, after) = (&inner[..end], &inner[end + 2..]);
    let sign = |c: char| c == '-' || c == '+';
    let body = tag.strip_prefix(sign).unwrap_or(tag);
    let open = &tag[..tag.len() - body.len()];
    let word = body.strip_suffix(sign).unwrap_or(body);
    let close = &body[word.len()..];
    let word = word.trim();
    let bare = !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphabetic());
    bare.then_some((open, word, close, after))
}

/// Two characters that occur nowhere in the variables.
fn unused_marks(variables: &Map<String, Value>) -> [char; 2] {
    let text = serde_json::to_string(variables).unwrap_or_default();
    let mut unused = ('\u{F0000}'..='\u{FFFFD}').filter(|c| !text.contains(*c));
    [
        unused.next().unwrap_or('\u{E000}'),
        unused.next().unwrap_or('\u{E001}'),
    ]
}

/// Removes the marks; returns the ranges of characters between them.
fn take_marks(text: &str, [begin, end]: [char; 2]) -> (String, Vec<Range<usize>>) {
    let (mut clean, mut spans) = (String::with_capacity(text.len()), Vec::new());
    let (mut at, mut from) = (0, 0);
    for c in text.chars() {
        if c == begin {
            from = at;
        } else if c == end {
            spans.push(from..at);
        } else {
            clean.push(c);
            at += 1;
        }
    }
    (clean, spans)
}

/// Cuts the prompt right after the last text of the last message.
fn cut_after_final_message(text: &mut String, messages: &[Message]) -> Result<()> {
    let last_text = messages.last().and_then(|message| {
        message.content.iter().rev().find_map(|part| match part {
            Content::Text(text) => Some(text.as_str()),
            _ => None,
        })
    });
    let Some(last) = last_text else {
        return Err(Error::Input(
            "continue_final_message is set, but the last message has no text to go on with: add a text part".into(),
        ));
    };
    let Some(at) = text.rfind(last.trim()) else {
        return Err(Error::Template(
            "continue_final_message is set, but the chat template leaves the last message's text out: use a template \
             that writes it as it is"
                .into(),
        ));
    };
    // Trailing space is kept where the template kept it.
    let kept = if text[at..].starts_with(last) {
        last
    } else {
        last.trim()
    };
    text.truncate(at + kept.len());
    Ok(())
}

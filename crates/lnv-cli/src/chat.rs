//! `lnv chat`: questions and answers about media, turn by turn, with the cache kept between turns.
//!
//! `/video PATH`, `/image PATH` attach media to the next question, `/clear` forgets everything,
//! `/history` shows what was said, `/quit` leaves. Ctrl-C stops an answer and stays; at an empty prompt
//! it leaves, as Ctrl-D does.

use std::io::{BufRead, IsTerminal, Read};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use llava_next_video::config::RopeOverride;
use llava_next_video::engine::{Engine, Event, GenerationOptions};
use llava_next_video::media::FrameSampling;
use llava_next_video::processor::conversation::{Content, Conversation, Message, Role};
use rustyline::error::ReadlineError;

use crate::args::ChatArgs;
use crate::ask::{DEFAULT_NEW_TOKENS, text_of};
use crate::media::{LoadedMedia, source};
use crate::model::{self, RunOptions};
use crate::output;
use crate::pipeline::{self, Clock, NamedMedium, Pipeline, StageBars};
use crate::progress::note;
use crate::stream::{AnswerStream, Text};

/// The longest question from a pipe.
const MAX_LINE_BYTES: u64 = 1 << 24;

/// What is shown before each question.
const PROMPT: &str = "you> ";

const HELP: &str = "/video PATH or /image PATH attaches a file or URL to the next question, /clear \
                    starts over, /history shows what was said, /quit leaves; Ctrl-C stops an answer";

/// Runs the command.
pub fn run(args: &ChatArgs, media: Vec<NamedMedium>) -> Result<()> {
    let options = RunOptions::new(&args.model.run)?;
    let sampling = model::sampling(&args.generation.frames)?;
    let pipeline = Pipeline::open(args.model.model.as_deref(), true)?;
    let generation = model::generation(
        &args.generation,
        &pipeline.generation,
        Some(DEFAULT_NEW_TOKENS),
    )?;
    // What was typed on the command line must be right; only then is the model worth loading.
    let first = match media.is_empty() {
        true => None,
        false => Some(load(pipeline::media_content(&media), sampling)?),
    };
    let frames = match options.rope {
        // The clips of a chat are not known yet; the number asked for stands in.
        Some(RopeOverride::Auto) => args.generation.frames.num_frames.unwrap_or(32),
        _ => 0,
    };
    let loaded = options.load(pipeline.config.clone(), &pipeline.files, frames)?;
    let mut chat = Chat {
        engine: Engine::new(Arc::new(loaded.model), pipeline.generation.clone()),
        conversation: Conversation::default(),
        media: LoadedMedia::default(),
        pending: Vec::new(),
        system: args.system.clone(),
        interrupted: output::stop_flag()?,
        load_s: loaded.seconds,
        pipeline,
        sampling,
        generation,
    };
    chat.begin();
    if let Some((content, loaded)) = first {
        chat.keep(content, loaded);
    }
    chat.talk()
}

/// Media that no conversation has yet.
fn load(content: Vec<Content>, sampling: FrameSampling) -> Result<(Vec<Content>, LoadedMedia)> {
    let alone = [Conversation {
        messages: vec![Message::new(Role::User, content.clone())],
    }];
    let loaded = LoadedMedia::load(&alone, sampling)?;
    Ok((content, loaded))
}

struct Chat {
    engine: Engine,
    conversation: Conversation,
    media: LoadedMedia,
    /// Media for the next question.
    pending: Vec<Content>,
    system: Option<String>,
    interrupted: Arc<AtomicBool>,
    load_s: f64,
    pipeline: Pipeline,
    sampling: FrameSampling,
    generation: GenerationOptions,
}

impl Chat {
    fn begin(&mut self) {
        self.conversation = Conversation::default();
        self.media = LoadedMedia::default();
        self.pending.clear();
        if let Some(system) = &self.system {
            self.conversation
                .messages
                .push(Message::text(Role::System, system.clone()));
        }
    }

    fn talk(&mut self) -> Result<()> {
        let mut lines = Lines::new()?;
        output::say(HELP);
        while let Some(line) = lines.next()? {
            self.interrupted.store(false, Ordering::SeqCst);
            let line = line.trim();
            match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
                ("", _) => {}
                ("/quit" | "/exit", _) => break,
                ("/help", _) => output::say(HELP),
                ("/clear", _) => self.begin(),
                ("/history", _) => self.history()?,
                ("/video", path) if !path.trim().is_empty() => {
                    self.attach(vec![Content::Video(Some(source(path.trim())))]);
                }
                ("/image", path) if !path.trim().is_empty() => {
                    self.attach(vec![Content::Image(Some(source(path.trim())))]);
                }
                (command @ ("/video" | "/image"), _) => {
                    output::say(&format!("{command} needs a file or a URL after it"));
                }
                (command, _) if command.starts_with('/') => {
                    output::say(&format!("{command} is no command here. {HELP}"));
                }
                _ => self.turn(line)?,
            }
        }
        Ok(())
    }

    /// Loads media for the next question; one that cannot be read leaves everything as it was.
    fn attach(&mut self, content: Vec<Content>) {
        match load(content, self.sampling) {
            Ok((content, loaded)) => self.keep(content, loaded),
            Err(error) => output::say(&format!("error: {}", output::sentence(&error))),
        }
    }

    fn keep(&mut self, content: Vec<Content>, loaded: LoadedMedia) {
        for _ in &loaded.images {
            output::say("attached an image");
        }
        for video in &loaded.videos {
            let frames = output::count(video.frames.len(), "frame");
            output::say(&format!("attached a video, {frames}"));
        }
        self.media.images.extend(loaded.images);
        self.media.videos.extend(loaded.videos);
        self.pending.extend(content);
    }

    /// One question. An error takes the question back and leaves the chat as it was.
    fn turn(&mut self, question: &str) -> Result<()> {
        let mut content = self.pending.clone();
        content.push(Content::Text(question.to_owned()));
        self.conversation
            .messages
            .push(Message::new(Role::User, content));
        match self.answer() {
            Ok(text) => {
                self.pending.clear();
                self.conversation
                    .messages
                    .push(Message::text(Role::Assistant, text));
                Ok(())
            }
            Err(error) if error.is::<output::ReaderGone>() => Err(error),
            Err(error) => {
                self.conversation.messages.pop();
                output::say(&format!("error: {}", output::sentence(&error)));
                Ok(())
            }
        }
    }

    fn answer(&mut self) -> Result<String> {
        let conversations = std::slice::from_ref(&self.conversation);
        let inputs = self.pipeline.inputs(conversations, &self.media, true)?;
        let tokenizer = &self.pipeline.processor.tokenizer;
        let mut stream = AnswerStream::new(tokenizer, self.generation.stop.clone());
        let eos = &self.pipeline.generation.eos_token_ids;
        let mut bars = StageBars::new();
        let mut failed = None;
        let interrupted = &self.interrupted;
        let mut on_event = |event: Event| {
            let _ = bars.show(&event);
            if let Event::Token { id, .. } = event
                && !eos.contains(&id)
                && let Err(error) = stream.push(id)
            {
                failed = Some(error);
            }
            match failed.is_some() || interrupted.load(Ordering::SeqCst) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let result =
            self.engine
                .generate(&inputs, &self.generation, &Text(tokenizer), &mut on_event);
        bars.finish();
        let generation = result?;
        if let Some(error) = failed {
            return Err(error);
        }
        stream.finish()?;
        let clock = Clock {
            media_s: 0.0,
            load_s: std::mem::take(&mut self.load_s),
        };
        let media = (self.media.frames(), self.media.images.len());
        pipeline::report(media, clock, &generation);
        let ids = generation.completions.first().map_or(&[][..], |c| &c.ids);
        text_of(&self.pipeline, ids, &self.generation)
    }

    fn history(&self) -> Result<()> {
        for message in &self.conversation.messages {
            let part = |content: &Content| match content {
                Content::Text(text) => text.clone(),
                Content::Image(_) => "[image]".into(),
                Content::Video(_) => "[video]".into(),
            };
            let text: Vec<String> = message.content.iter().map(part).collect();
            output::line(&format!("{}: {}", message.role.as_str(), text.join(" ")))?;
        }
        Ok(())
    }
}

/// Lines from a person (with editing and history) or from a pipe.
enum Lines {
    Person(Box<rustyline::DefaultEditor>),
    Pipe(std::io::StdinLock<'static>),
}

impl Lines {
    fn new() -> Result<Self> {
        match std::io::stdin().is_terminal() {
            true => match rustyline::DefaultEditor::new() {
                Ok(editor) => Ok(Self::Person(Box::new(editor))),
                Err(cause) => {
                    note(&format!("no line editing here ({cause})"));
                    Ok(Self::Pipe(std::io::stdin().lock()))
                }
            },
            false => Ok(Self::Pipe(std::io::stdin().lock())),
        }
    }

    fn next(&mut self) -> Result<Option<String>> {
        match self {
            Self::Pipe(input) => {
                let mut line = Vec::new();
                let read = input.take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
                let read = read.context("cannot read the question")?;
                // Bytes that are no text become the replacement character: one odd line ends nothing.
                Ok((read > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
            }
            Self::Person(editor) => match editor.readline(PROMPT) {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(cause) => Err(cause).context("cannot read the question"),
            },
        }
    }
}

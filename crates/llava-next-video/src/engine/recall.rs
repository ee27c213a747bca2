//! Features on their way from the disk, read beside the engine.
//!
//! Decision: a thread of its own reads and checks files, so that nobody's next token waits for a disk: an image has
//! some 50 MB. The engine asks for a few at a time, takes in each step what has come, and rests a moment where
//! there is nothing else to do. A picture that is asked for is not encoded before the disk is known not to have
//! it. A thread that is gone has nothing, so that its pictures are encoded and nobody waits for ever.

use std::collections::HashSet;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;

use lnv_kernels::Buffer;

use super::prefix::Digest;

/// Files that are asked for at a time: enough that the thread need not wait for a step, and few enough that
/// little is read in vain and held when requests go away.
const AHEAD: usize = 8;

/// How long the engine rests at most where it has nothing else to do: requests may come and go.
const PAUSE: Duration = Duration::from_millis(5);

/// Rows and columns.
type Shape = (usize, usize);

/// What is asked for.
type Asked = (Digest, Shape);

/// A picture, and its features if the disk has them.
pub(crate) type Recalled = (Digest, Option<Buffer>);

/// The thread, and what it was asked for.
pub(crate) struct Recall {
    /// Both until the thread is to end.
    channels: Option<(Sender<Asked>, Receiver<Recalled>)>,
    asked: HashSet<Digest>,
    /// What has come and was not taken yet.
    come: Vec<Recalled>,
    thread: Option<JoinHandle<()>>,
}

impl Recall {
    /// Reads by `read`, on the thread.
    pub fn new(read: impl Fn(&Digest, Shape) -> Option<Buffer> + Send + 'static) -> Self {
        let (ask, asked) = mpsc::channel::<Asked>();
        let (answer, answers) = mpsc::channel();
        let run = move || {
            for (digest, shape) in asked {
                if answer.send((digest, read(&digest, shape))).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("recall".into());
        Self {
            channels: Some((ask, answers)),
            asked: HashSet::new(),
            come: Vec::new(),
            // Without a thread nothing is found.
            thread: thread.spawn(run).ok(),
        }
    }

    /// Asks for a picture, unless that was done or too many are asked for.
    pub fn ask(&mut self, digest: Digest, shape: Shape) {
        if self.asked.len() < AHEAD
            && self.asked.insert(digest)
            && let Some((ask, _)) = &self.channels
        {
            // Where nobody hears it, that is found out when the answer is looked for.
            let _ = ask.send((digest, shape));
        }
    }

    /// What has come since it was asked last.
    pub fn take(&mut self) -> Vec<Recalled> {
        let mut come = std::mem::take(&mut self.come);
        if let Some((_, answers)) = &self.channels {
            loop {
                match answers.try_recv() {
                    Ok(answer) => come.push(answer),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        come.extend(self.asked.drain().map(|digest| (digest, None)));
                        break;
                    }
                }
            }
        }
        for (digest, _) in &come {
            self.asked.remove(digest);
        }
        come
    }

    /// Rests until something comes, and not for long; false where nothing will.
    pub fn wait(&mut self) -> bool {
        let Some((_, answers)) = self.channels.as_ref().filter(|_| !self.asked.is_empty()) else {
            return false;
        };
        self.come.extend(answers.recv_timeout(PAUSE));
        true
    }
}

/// Ends the thread, at the latest after the file that it reads.
impl Drop for Recall {
    fn drop(&mut self) {
        self.channels = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ops::ControlFlow;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex};

    use super::super::{
        Engine, Event, FeatureStore, Generation, GenerationOptions, Prepared, RequestEvent,
        RequestId,
    };
    use super::*;
    use crate::config::{CheckpointFiles, GenerationConfig, LlavaNextVideoConfig};
    use crate::model::{LlavaNextVideoModel, LoadOptions};
    use crate::processor::inputs::ModelInputs;
    use crate::processor::{LlavaNextVideoProcessor, ModelFacts};

    /// The tiny checkpoint.
    struct Fixture {
        model: Arc<LlavaNextVideoModel>,
        directory: PathBuf,
        processor: LlavaNextVideoProcessor,
    }

    impl Fixture {
        fn new() -> Self {
            let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
            let directory = manifest.join("../../testdata/golden/llama-default");
            let files = CheckpointFiles::open(&directory).unwrap();
            let facts = ModelFacts::from(&LlavaNextVideoConfig::read(&files).unwrap());
            let options = LoadOptions::default();
            Self {
                model: Arc::new(LlavaNextVideoModel::load(&files, &options).unwrap()),
                processor: LlavaNextVideoProcessor::from_files(&files, &facts).unwrap(),
                directory,
            }
        }

        fn engine(&self) -> Engine {
            Engine::new(Arc::clone(&self.model), GenerationConfig::default())
        }

        fn inputs(&self, case: &str) -> ModelInputs {
            let path = self.directory.join(format!("{case}.inputs.safetensors"));
            let bytes = std::fs::read(path).unwrap();
            let inputs = ModelInputs::from_safetensors(&bytes, self.processor.facts());
            inputs.unwrap().inputs
        }

        fn ask(&self, engine: &mut Engine, case: &str, tokens: usize) -> RequestId {
            let defaults = GenerationConfig::default();
            let (inputs, options) = (self.inputs(case), options(tokens));
            let prepared = Prepared::new(&self.model, &defaults, inputs, &options, None);
            engine.submit(prepared.unwrap(), 0)
        }
    }

    fn options(tokens: usize) -> GenerationOptions {
        GenerationOptions {
            max_new_tokens: Some(tokens),
            eos_token_ids: Some(Vec::new()),
            ..GenerationOptions::default()
        }
    }

    fn alone(engine: &mut Engine, inputs: &ModelInputs, tokens: usize) -> Generation {
        let on_event = &mut |_| ControlFlow::Continue(());
        let answer = engine.generate(inputs, &options(tokens), &(), on_event);
        answer.unwrap()
    }

    /// One step: whose tokens came, and who is done.
    fn step(engine: &mut Engine) -> (Vec<RequestId>, Vec<(RequestId, Generation)>) {
        let (mut tokens, mut done) = (Vec::new(), Vec::new());
        let busy = engine.step(&(), &mut |id, event| {
            match event {
                RequestEvent::Progress(Event::Token { .. }) => tokens.push(id),
                RequestEvent::Done(answer) => done.push((id, answer.unwrap())),
                RequestEvent::Started | RequestEvent::Progress(_) => {}
            }
            ControlFlow::Continue(())
        });
        assert!(busy, "it sleeps although the disk has not answered");
        (tokens, done)
    }

    #[test]
    fn a_disk_that_takes_its_time_keeps_nobody_waiting_but_who_asks() {
        let fixture = Fixture::new();
        let directory = tempfile::tempdir().unwrap();
        let store = FeatureStore::open(directory.path(), 1 << 30, &fixture.model).unwrap();
        let mut engine = fixture.engine();
        engine.set_feature_store(Arc::new(store));
        let expected = alone(&mut engine, &fixture.inputs("mixed-turns"), 5);
        drop(engine);

        let store = FeatureStore::open(directory.path(), 1 << 30, &fixture.model).unwrap();
        let (begin, begun) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let mut engine = fixture.engine();
        engine.recall = Some(Recall::new(move |digest, shape| {
            begin.send(()).unwrap();
            // Until nobody holds the other end any more.
            let _ = released.lock().unwrap().recv();
            store.get(digest, shape)
        }));
        let other = fixture.ask(&mut engine, "text-only", 60);
        let slow = fixture.ask(&mut engine, "mixed-turns", 5);
        for _ in 0..40 {
            assert_eq!(step(&mut engine).0, [other]);
        }
        begun.recv().unwrap();
        assert_eq!(engine.stats().features_read, 0);
        drop(release);
        let mut answers = Vec::new();
        while answers.len() < 2 {
            answers.extend(step(&mut engine).1);
        }
        let answer = answers.iter().find(|(id, _)| *id == slow).unwrap();
        assert_eq!(answer.1.completions, expected.completions);
        let stats = engine.stats();
        assert!(stats.features_read > 1);
        assert_eq!((stats.features_encoded, stats.blocks_in_use), (0, 0));
    }

    #[test]
    fn where_the_thread_is_gone_pictures_are_encoded() {
        let fixture = Fixture::new();
        let inputs = fixture.inputs("one-video");
        let expected = alone(&mut fixture.engine(), &inputs, 5);
        let mut engine = fixture.engine();
        engine.recall = Some(Recall::new(|_, _| panic!("a disk that nobody expected")));
        let answer = alone(&mut engine, &inputs, 5);
        assert_eq!(answer.completions, expected.completions);
        assert_eq!(engine.stats().features_read, 0);
    }

    #[test]
    fn few_are_asked_for_at_a_time_each_once_and_the_end_waits_for_one() {
        let (came, comes) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let mut recall = Recall::new(move |digest, _| {
            came.send(digest[0]).unwrap();
            let _ = released.lock().unwrap().recv();
            None
        });
        assert!(!recall.wait(), "nothing was asked for");
        for n in [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
            recall.ask([n; 32], (1, 1));
        }
        for _ in 0..AHEAD {
            release.send(()).unwrap();
        }
        let mut all = Vec::new();
        while recall.wait() {
            all.extend(recall.take().into_iter().map(|(digest, _)| digest[0]));
        }
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
        (10..13).for_each(|n| recall.ask([n; 32], (1, 1)));
        assert_eq!(comes.iter().nth(AHEAD), Some(10), "it reads");
        drop(release);
        drop(recall);
        assert!(comes.iter().count() <= 2, "it read on where it could");
    }
}

//! Many requests at once: answers are those of each alone, token for token, whatever else runs, whoever
//! leaves and however little memory there is; and nothing is held when all is over.

#![allow(clippy::unwrap_used, missing_docs)]

mod fixture;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use fixture::{Fixture, load, nothing_is_held, options};
use llava_next_video::config::{Dtype, Quantization};
use llava_next_video::engine::{
    Constraint, Constraints, EngineLimits, Event, FeatureStore, FinishReason, Generation,
    GenerationOptions, Prefer, Refused, Request, RequestEvent, Sampling, Service, ServiceLimits,
};
use llava_next_video::processor::inputs::ModelInputs;
use llava_next_video::{Error, Result};

const CASES: [&str; 8] = [
    "one-video",
    "one-image",
    "text-only",
    "images-over-turns",
    "mixed-turns",
    "image-very-wide",
    "batch-kinds",
    "batch-videos",
];

type Answer = mpsc::Receiver<Result<Generation>>;

/// Hands a request over; what it answers comes out of the receiver. `stop_at` tokens it goes away.
fn ask(
    service: &Service,
    inputs: &ModelInputs,
    options: &GenerationOptions,
    (client, stop_at): (u64, Option<usize>),
) -> Answer {
    let (sender, receiver) = mpsc::channel();
    let mut tokens = 0;
    let on_event = move |event: RequestEvent| match event {
        RequestEvent::Progress(Event::Token { .. }) => {
            tokens += 1;
            match stop_at == Some(tokens) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        }
        RequestEvent::Started | RequestEvent::Progress(_) => ControlFlow::Continue(()),
        RequestEvent::Done(result) => {
            sender.send(result).unwrap();
            ControlFlow::Continue(())
        }
    };
    let request = Request {
        inputs: inputs.clone(),
        options: options.clone(),
        constraints: None,
        client,
        on_event: Box::new(on_event),
    };
    service.submit(request).unwrap();
    receiver
}

fn answer(receiver: &Answer) -> Generation {
    receiver
        .recv_timeout(Duration::from_secs(120))
        .unwrap()
        .unwrap()
}

#[test]
fn answers_under_load_are_those_of_each_alone() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let sampled = GenerationOptions {
        sampling: Some(Sampling {
            temperature: 1.3,
            ..Sampling::default()
        }),
        num_return_sequences: 3,
        seed: 11,
        ..options(10)
    };
    let beams = GenerationOptions {
        num_beams: Some(3),
        ..options(7)
    };
    let ways = [options(24), sampled, beams, options(3)];
    let alone: Vec<Vec<Generation>> = (ways.iter())
        .map(|way| inputs.iter().map(|i| fixture.alone(i, way)).collect())
        .collect();
    // Plenty of room, little room, and chunks that cut pictures in two.
    let (latency, throughput) = (Prefer::Latency, Prefer::Throughput);
    for (cache_blocks, batch, prefill_chunk, prefer) in [
        (Some(400), 64, 2048, latency),
        (Some(40), 6, 17, latency),
        (None, 64, 50, throughput),
    ] {
        let service = fixture.service(EngineLimits {
            cache_blocks,
            batch,
            prefill_chunk,
            prefer,
            ..EngineLimits::default()
        });
        let mut asked = Vec::new();
        for round in 0..3 {
            for (w, way) in ways.iter().enumerate() {
                for (i, input) in inputs.iter().enumerate() {
                    let client = (round + i) as u64;
                    asked.push((w, i, ask(&service, input, way, (client, None))));
                }
            }
        }
        for (w, i, receiver) in &asked {
            let got = answer(receiver);
            assert_eq!(
                got.completions, alone[*w][*i].completions,
                "way {w}, case {i}, {cache_blocks:?} blocks"
            );
            assert_eq!(got.prompt_tokens, alone[*w][*i].prompt_tokens);
        }
        nothing_is_held(&service);
        let stats = service.stats();
        assert_eq!(stats.answered, asked.len());
        assert!(
            stats.cached_tokens > 0,
            "the same prompts were asked three times"
        );
    }
}

#[test]
fn where_the_cache_is_full_the_youngest_waits_and_is_answered_all_the_same() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let text = inputs.iter().min_by_key(|i| i.input_ids[0].len()).unwrap();
    let long = options(150);
    let alone = fixture.alone(text, &long).completions;
    // Each needs a block for its prompt and two or three more for its answer.
    let service = fixture.service(EngineLimits {
        cache_blocks: Some(6),
        ..EngineLimits::default()
    });
    let asked: Vec<Answer> = (0..5)
        .map(|c| ask(&service, text, &long, (c, None)))
        .collect();
    for receiver in &asked {
        assert_eq!(answer(receiver).completions, alone);
    }
    nothing_is_held(&service);
    let stats = service.stats();
    assert!(stats.preempted > 0, "it was full");
    assert_eq!(stats.answered, 5);
}

#[test]
fn a_prompt_that_can_never_fit_is_refused_and_an_answer_that_fills_the_cache_is_cut() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let longest = inputs.iter().max_by_key(|i| i.input_ids[0].len()).unwrap();
    let shortest = inputs.iter().min_by_key(|i| i.input_ids[0].len()).unwrap();
    let service = fixture.service(EngineLimits {
        cache_blocks: Some(2),
        ..EngineLimits::default()
    });
    let refused = ask(&service, longest, &options(4), (0, None));
    let error = refused
        .recv_timeout(Duration::from_secs(60))
        .unwrap()
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the cache of keys and values holds 128"),
        "{error}"
    );
    let cut = answer(&ask(&service, shortest, &options(1000), (0, None)));
    assert_eq!(cut.completions[0].finish_reason, FinishReason::Length);
    let tokens = shortest.input_ids[0].len() + cut.completions[0].ids.len();
    assert!((120..=130).contains(&tokens), "{tokens}");
    nothing_is_held(&service);
}

#[test]
fn who_leaves_holds_nothing_and_changes_nothing() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let way = options(20);
    let alone: Vec<Generation> = inputs.iter().map(|i| fixture.alone(i, &way)).collect();
    let service = fixture.service(EngineLimits {
        cache_blocks: Some(120),
        ..EngineLimits::default()
    });
    let mut asked = Vec::new();
    for round in 0..30 {
        let i = round % inputs.len();
        let stop_at = (round % 3 == 0).then_some(1 + round % 7);
        asked.push((
            i,
            stop_at,
            ask(&service, &inputs[i], &way, (round as u64, stop_at)),
        ));
    }
    for (i, stop_at, receiver) in &asked {
        let got = answer(receiver);
        for (got, alone) in got.completions.iter().zip(&alone[*i].completions) {
            assert_eq!(got.ids[..], alone.ids[..got.ids.len()]);
            if stop_at.is_none() {
                assert_eq!(got, alone);
            }
        }
    }
    nothing_is_held(&service);
    assert_eq!(service.stats().cancelled, 10);
}

#[test]
fn questions_about_one_video_share_its_prefill() {
    let fixture = Fixture::new(&CASES);
    let video = fixture.inputs[0].clone();
    let ids = video.input_ids[0].clone();
    let service = fixture.service(EngineLimits::default());
    let ask_with = |last: u32| {
        let mut other = video.clone();
        *other.input_ids[0].last_mut().unwrap() = last;
        let alone = fixture.alone(&other, &options(6)).completions;
        (
            alone,
            ask(&service, &other, &options(6), (u64::from(last), None)),
        )
    };
    let asked: Vec<_> = (5..11).map(ask_with).collect();
    let mut cached = Vec::new();
    for (alone, receiver) in &asked {
        let got = answer(receiver);
        assert_eq!(&got.completions, alone);
        cached.push(got.cached_tokens);
    }
    let whole_blocks = (ids.len() - 1) / 64 * 64;
    assert!(
        cached
            .iter()
            .filter(|tokens| **tokens >= whole_blocks)
            .count()
            >= 5,
        "{cached:?} of {}",
        ids.len()
    );
    let frames = video.videos.iter().map(|v| v.frames.count).sum::<usize>();
    let stats = service.stats();
    assert!(
        stats.features_encoded <= frames,
        "each frame is seen once: {stats:?}"
    );
}

#[test]
fn wrong_requests_are_told_and_full_queues_refuse() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let engine = fixture.engine(EngineLimits::default());
    let service = Service::start(engine, Arc::new(()), ServiceLimits { waiting: 0 });
    let request = |options: GenerationOptions, sender: mpsc::Sender<Result<Generation>>| Request {
        inputs: inputs[0].clone(),
        options,
        constraints: None,
        client: 0,
        on_event: Box::new(move |event| {
            if let RequestEvent::Done(result) = event {
                let _ = sender.send(result);
            }
            ControlFlow::Continue(())
        }),
    };
    let (sender, receiver) = mpsc::channel();
    assert_eq!(
        service
            .submit(request(options(1), sender.clone()))
            .unwrap_err(),
        Refused::Full(0)
    );
    let service = fixture.service(EngineLimits::default());
    service.submit(request(options(0), sender.clone())).unwrap();
    let error = receiver
        .recv_timeout(Duration::from_secs(5))
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("max_new_tokens"), "{error}");
    assert!(service.is_idle());
    service.close();
    assert_eq!(
        service.submit(request(options(1), sender)).unwrap_err(),
        Refused::Closing
    );
}

#[test]
fn a_request_hears_when_it_runs_and_when_each_stage_begins() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let seen = inputs
        .iter()
        .find(|inputs| !inputs.videos.is_empty())
        .unwrap();
    let service = fixture.service(EngineLimits::default());
    let (sender, receiver) = mpsc::channel();
    let request = Request {
        inputs: seen.clone(),
        options: options(2),
        constraints: None,
        client: 0,
        on_event: Box::new(move |event| {
            let _ = sender.send(event);
            ControlFlow::Continue(())
        }),
    };
    service.submit(request).unwrap();
    let events: Vec<RequestEvent> = receiver.iter().collect();
    let is_start = |event: &RequestEvent| matches!(event, RequestEvent::Started);
    assert!(is_start(&events[0]), "{events:?}");
    assert_eq!(events.iter().filter(|event| is_start(event)).count(), 1);
    let mut stages = Vec::new();
    for event in &events[1..] {
        let (stage, done) = match event {
            RequestEvent::Progress(Event::Vision { done, .. }) => ("vision", *done),
            RequestEvent::Progress(Event::Prefill { done, .. }) => ("prefill", *done),
            RequestEvent::Progress(Event::Token { .. }) => ("token", 0),
            RequestEvent::Started | RequestEvent::Done(_) => ("done", 0),
        };
        if stages.last() != Some(&stage) {
            assert_eq!(
                done, 0,
                "{stage} is not told from its beginning: {events:?}"
            );
            stages.push(stage);
        }
    }
    assert_eq!(stages, ["vision", "prefill", "token", "done"]);
}

#[test]
fn a_bug_ends_every_request_as_one_and_is_known_afterwards() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let service = fixture.service(EngineLimits::default());
    let other = ask(&service, &inputs[0], &options(4000), (1, None));
    assert!(!service.is_broken());
    let panics = Request {
        inputs: inputs[0].clone(),
        options: options(2),
        constraints: None,
        client: 0,
        on_event: Box::new(|_| panic!("on purpose")),
    };
    service.submit(panics).unwrap();
    let error = other.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(error, Err(Error::Internal(_))), "{error:?}");
    assert!(service.is_broken());
    let late = Request {
        inputs: inputs[0].clone(),
        options: options(1),
        constraints: None,
        client: 0,
        on_event: Box::new(|_| ControlFlow::Continue(())),
    };
    assert_eq!(service.submit(late).unwrap_err(), Refused::Broken);
}

/// Only even ids, and an error at the fourth token if asked for.
struct Even(bool);

struct EvenHere(bool, usize);

impl Constraints for Even {
    fn begin(&self) -> Box<dyn Constraint> {
        Box::new(EvenHere(self.0, 0))
    }
}

impl Constraint for EvenHere {
    fn restrict(&mut self, scores: &mut [f32]) -> Result<()> {
        scores
            .iter_mut()
            .skip(1)
            .step_by(2)
            .for_each(|s| *s = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, id: u32) -> Result<()> {
        assert_eq!(id % 2, 0);
        self.1 += 1;
        match self.0 && self.1 == 4 {
            true => Err(llava_next_video::Error::Input("no fourth".into())),
            false => Ok(()),
        }
    }
}

#[test]
fn constraints_and_log_probabilities_belong_to_their_request() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs;
    let service = fixture.service(EngineLimits::default());
    let ask_with = |constraints: Option<Arc<dyn Constraints>>, logprobs: Option<usize>| {
        let (sender, receiver) = mpsc::channel();
        let on_event = move |event: RequestEvent| {
            if let RequestEvent::Done(result) = event {
                let _ = sender.send(result);
            }
            ControlFlow::Continue(())
        };
        let request = Request {
            inputs: inputs[0].clone(),
            options: GenerationOptions {
                logprobs,
                ..options(12)
            },
            constraints,
            client: 0,
            on_event: Box::new(on_event),
        };
        service.submit(request).unwrap();
        receiver
    };
    let even = ask_with(Some(Arc::new(Even(false))), None);
    let fails = ask_with(Some(Arc::new(Even(true))), None);
    let plain = ask_with(None, Some(3));
    let even = answer(&even);
    assert!(even.completions[0].ids.iter().all(|id| id % 2 == 0));
    assert!(even.completions[0].logprobs.is_empty());
    let error = fails
        .recv_timeout(Duration::from_secs(60))
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("no fourth"), "{error}");
    let plain = answer(&plain);
    let alone = fixture.alone(&inputs[0], &options(12));
    assert_eq!(plain.completions[0].ids, alone.completions[0].ids);
    assert_eq!(plain.completions[0].logprobs.len(), 12);
    for (id, told) in plain.completions[0]
        .ids
        .iter()
        .zip(&plain.completions[0].logprobs)
    {
        assert_eq!((told.id, told.top.len()), (*id, 3));
        // Greedy: the token is the likeliest.
        assert_eq!(told.top[0], (*id, told.logprob));
        assert!(told.top[0].1 >= told.top[1].1 && told.top[1].1 >= told.top[2].1);
        assert!(told.top.iter().map(|(_, p)| p.exp()).sum::<f32>() <= 1.0 + 1e-5);
    }
    nothing_is_held(&service);
}

fn store(fixture: &Fixture, directory: &Path) -> Arc<FeatureStore> {
    Arc::new(FeatureStore::open(directory, 1 << 30, &fixture.model).unwrap())
}

/// Answers of all cases at once by a new engine that keeps features in `directory`; how many pictures
/// it has read from there and how many it has encoded.
fn with_store(
    fixture: &Fixture,
    directory: &Path,
    limits: EngineLimits,
) -> (Vec<Generation>, (usize, usize)) {
    let mut engine = fixture.engine(limits);
    engine.set_feature_store(store(fixture, directory));
    let service = Service::start(engine, Arc::new(()), ServiceLimits::default());
    let inputs = &fixture.inputs;
    let asked: Vec<Answer> = (inputs.iter())
        .map(|inputs| ask(&service, inputs, &options(16), (0, None)))
        .collect();
    let answers = asked.iter().map(answer).collect();
    nothing_is_held(&service);
    let stats = service.stats();
    (answers, (stats.features_read, stats.features_encoded))
}

fn files_of(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = (std::fs::read_dir(directory).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

#[test]
fn another_engine_finds_pictures_on_disk_and_answers_the_same() {
    let fixture = Fixture::new(&CASES);
    let alone: Vec<Generation> = (fixture.inputs.iter())
        .map(|inputs| fixture.alone(inputs, &options(16)))
        .collect();
    let same = |answers: &[Generation], what: &str| {
        for (case, (answer, alone)) in answers.iter().zip(&alone).enumerate() {
            assert_eq!(answer.completions, alone.completions, "{what}, case {case}");
        }
    };
    let kept = tempfile::tempdir().unwrap();
    let directory = kept.path();
    // An engine that ends has written all.
    let mut first = fixture.engine(EngineLimits::default());
    first.set_feature_store(store(&fixture, directory));
    let mut answers = Vec::new();
    for inputs in &fixture.inputs {
        let on_event = &mut |_| ControlFlow::Continue(());
        answers.push(first.generate(inputs, &options(16), &(), on_event).unwrap());
    }
    drop(first);
    same(&answers, "writing");
    let files = files_of(directory);
    assert!(files.len() > 8, "videos and images");

    let roomy = EngineLimits::default();
    let (answers, counts) = with_store(&fixture, directory, roomy);
    same(&answers, "reading");
    assert_eq!(counts, (files.len(), 0), "read and encoded");

    // What nobody holds is not kept in memory, and much is put back and read again.
    let cramped = EngineLimits {
        cache_blocks: Some(40),
        batch: 6,
        prefill_chunk: 17,
        feature_bytes: 0,
        ..roomy
    };
    let (answers, (read, encoded)) = with_store(&fixture, directory, cramped);
    same(&answers, "reading in little room");
    assert!(read >= files.len() && encoded == 0, "{read}, {encoded}");

    // One is cut, one is damaged, one is gone, one is another's.
    let bytes = std::fs::read(&files[0]).unwrap();
    std::fs::write(&files[0], &bytes[..bytes.len() / 2]).unwrap();
    let mut bytes = std::fs::read(&files[1]).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&files[1], bytes).unwrap();
    std::fs::remove_file(&files[2]).unwrap();
    std::fs::copy(&files[4], &files[3]).unwrap();
    let (answers, counts) = with_store(&fixture, directory, roomy);
    same(&answers, "mending");
    assert_eq!(counts, (files.len() - 4, 4), "read and encoded");

    let nowhere = directory.join("nowhere");
    let mut engine = fixture.engine(EngineLimits::default());
    engine.set_feature_store(store(&fixture, &nowhere));
    std::fs::remove_dir(&nowhere).unwrap();
    let inputs = &fixture.inputs[0];
    let on_event = &mut |_| ControlFlow::Continue(());
    let answer = engine.generate(inputs, &options(16), &(), on_event);
    same(&[answer.unwrap()], "without a directory");
}

#[test]
fn features_belong_to_weights_and_to_how_they_are_kept() {
    let name = |dtype, quantization| load(dtype, quantization).vision_fingerprint();
    let names = [
        name(Dtype::F32, None),
        name(Dtype::Bf16, None),
        name(Dtype::F16, None),
        name(Dtype::Bf16, Some(Quantization::Q8)),
    ];
    for (i, one) in names.iter().enumerate() {
        assert!(!names[..i].contains(one), "{i}");
    }
    assert_eq!(name(Dtype::F32, None), names[0], "loaded again");
    let four_bits = name(Dtype::Bf16, Some(Quantization::Q4));
    assert_eq!(four_bits, names[3], "it keeps what sees in 8 bits too");
}

//! Videos whose frames arrive one by one: answers are those of the same frames all at once, token for token; what is
//! there is seen before the rest has come; and a feed that is slow, broken or forgotten is nobody else's trouble.

#![allow(clippy::unwrap_used, missing_docs)]

mod fixture;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use fixture::{Fixture, nothing_is_held, options};
use llava_next_video::engine::{
    EngineLimits, Event, Generation, GenerationOptions, Request, RequestEvent, RequestId, Service,
};
use llava_next_video::media::{FrameSampling, MediaLimits, decode_video};
use llava_next_video::model::ForwardOptions;
use llava_next_video::processor::arriving::FrameFeed;
use llava_next_video::processor::inputs::{ModelInputs, Pixels, VideoInput};
use llava_next_video::{Error, Result};

const CASES: [&str; 4] = ["one-video", "mixed-turns", "batch-kinds", "batch-videos"];

/// A video that is still to come, and how to have it come.
struct Coming {
    feed: FrameFeed,
    frames: Vec<Pixels>,
}

impl Coming {
    fn push(&mut self) -> Result<()> {
        self.feed.push(self.frames.remove(0))
    }

    /// All that is left, with a pause before each frame.
    fn push_all(mut self, pause: Duration) -> Result<()> {
        while !self.frames.is_empty() {
            std::thread::sleep(pause);
            self.push()?;
        }
        Ok(())
    }
}

/// The same inputs with no frame there yet.
fn arriving(inputs: &ModelInputs) -> (ModelInputs, Vec<Coming>) {
    let (mut inputs, mut all) = (inputs.clone(), Vec::new());
    for video in &mut inputs.videos {
        let whole = video.frames.clone();
        let stride = whole.stride();
        let (feed, coming) = VideoInput::arriving(whole.count, whole.size).unwrap();
        *video = coming;
        let frames = whole.data.chunks_exact(stride).map(|data| Pixels {
            count: 1,
            size: whole.size,
            data: Arc::new(data.to_vec()),
        });
        all.push(Coming {
            feed,
            frames: frames.collect(),
        });
    }
    (inputs, all)
}

struct Asked {
    id: RequestId,
    events: mpsc::Receiver<RequestEvent>,
}

fn ask(service: &Service, inputs: ModelInputs, options: &GenerationOptions) -> Asked {
    let (sender, events) = mpsc::channel();
    let request = Request {
        inputs,
        options: options.clone(),
        constraints: None,
        client: 0,
        on_event: Box::new(move |event| {
            let _ = sender.send(event);
            ControlFlow::Continue(())
        }),
    };
    let id = service.submit(request).unwrap();
    Asked { id, events }
}

impl Asked {
    fn next(&self) -> RequestEvent {
        self.events.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    fn answer(&self) -> Result<Generation> {
        loop {
            if let RequestEvent::Done(result) = self.next() {
                return result;
            }
        }
    }

    /// Waits until so many pictures have been seen.
    fn until_seen(&self, wanted: usize) {
        loop {
            match self.next() {
                RequestEvent::Progress(Event::Vision { done, .. }) if done >= wanted => return,
                RequestEvent::Progress(Event::Token { .. }) | RequestEvent::Done(_) => {
                    panic!("over before picture {wanted} was seen")
                }
                RequestEvent::Started | RequestEvent::Progress(_) => {}
            }
        }
    }
}

#[test]
fn frames_are_seen_before_the_next_has_come() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs[0];
    let alone = fixture.alone(inputs, &options(12));
    let service = fixture.service(EngineLimits::default());
    let (inputs, mut coming) = arriving(inputs);
    let mut coming = coming.remove(0);
    let asked = ask(&service, inputs, &options(12));
    let count = coming.frames.len();
    assert!(count > 2);
    for seen in 1..=count {
        coming.push().unwrap();
        asked.until_seen(seen);
    }
    let got = asked.answer().unwrap();
    assert_eq!(got.completions, alone.completions);
    assert_eq!(service.stats().features_encoded, count);
    nothing_is_held(&service);
}

#[test]
fn what_stands_before_the_last_frame_is_read_before_it_has_come() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs[0];
    let alone = fixture.alone(inputs, &options(8));
    let (ids, id) = (&inputs.input_ids[0], fixture.processor.video_token_id);
    let places = ids.iter().filter(|own| **own == id).count();
    let first = ids.iter().position(|own| *own == id).unwrap();
    // Each token is worth a pass.
    let service = fixture.service(EngineLimits {
        prefill_chunk: 1,
        ..EngineLimits::default()
    });
    let (late, mut coming) = arriving(inputs);
    let mut coming = coming.remove(0);
    let frames = coming.frames.len();
    let asked = ask(&service, late, &options(8));
    (1..frames).for_each(|_| coming.push().unwrap());
    let before_last = first + places / frames * (frames - 1);
    loop {
        match asked.next() {
            // In layers times tokens.
            RequestEvent::Progress(Event::Prefill { done, total })
                if done * ids.len() >= total * before_last =>
            {
                break;
            }
            RequestEvent::Started
            | RequestEvent::Progress(Event::Vision { .. } | Event::Prefill { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    coming.push().unwrap();
    assert_eq!(asked.answer().unwrap().completions, alone.completions);
    nothing_is_held(&service);
}

#[test]
fn while_all_wait_for_frames_the_engine_sleeps() {
    let fixture = Fixture::new(&CASES);
    let service = fixture.service(EngineLimits::default());
    let (inputs, mut coming) = arriving(&fixture.inputs[0]);
    let mut coming = coming.remove(0);
    let asked = ask(&service, inputs, &options(3));
    coming.push().unwrap();
    asked.until_seen(1);
    std::thread::sleep(Duration::from_millis(50));
    let before = service.stats().steps;
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(service.stats().steps, before);
    // Others are answered meanwhile, also those who ask about the same clip.
    for inputs in &fixture.inputs {
        let got = ask(&service, inputs.clone(), &options(3)).answer().unwrap();
        let alone = fixture.alone(inputs, &options(3));
        assert_eq!(got.completions, alone.completions);
    }
    coming.push_all(Duration::ZERO).unwrap();
    asked.answer().unwrap();
    nothing_is_held(&service);
}

#[test]
fn what_waits_for_frames_leaves_its_room_to_others() {
    let fixture = Fixture::new(&CASES);
    let inputs = &fixture.inputs[0];
    let blocks = inputs.input_ids[0].len().div_ceil(64) + 1;
    let mut other = inputs.clone();
    other.input_ids[0][0] += 1;
    for (cache_blocks, batch) in [(Some(blocks), 64), (None, 1)] {
        let service = fixture.service(EngineLimits {
            cache_blocks,
            batch,
            ..EngineLimits::default()
        });
        let (late, mut coming) = arriving(inputs);
        let mut coming = coming.remove(0);
        let waits = ask(&service, late, &options(5));
        coming.push().unwrap();
        waits.until_seen(1);
        for _ in 0..3 {
            let got = ask(&service, other.clone(), &options(5)).answer().unwrap();
            let alone = fixture.alone(&other, &options(5));
            assert_eq!(got.completions, alone.completions);
        }
        coming.push_all(Duration::from_millis(1)).unwrap();
        let got = waits.answer().unwrap();
        let alone = fixture.alone(inputs, &options(5));
        assert_eq!(got.completions, alone.completions);
        let stats = service.stats();
        assert_eq!((stats.preempted, stats.answered), (1, 4));
        nothing_is_held(&service);
    }
}

#[test]
fn the_cache_finds_what_it_would_have_found() {
    let fixture = Fixture::new(&CASES);
    let service = fixture.service(EngineLimits::default());
    let inputs = &fixture.inputs[0];
    let first = ask(&service, inputs.clone(), &options(4)).answer().unwrap();
    let second = ask(&service, inputs.clone(), &options(4)).answer().unwrap();
    assert_eq!(first.cached_tokens, 0);
    assert_eq!(second.cached_tokens, inputs.input_ids[0].len() - 1);
    let encoded = service.stats().features_encoded;
    for pause in [0, 5] {
        let (late, coming) = arriving(inputs);
        let asked = ask(&service, late, &options(4));
        for coming in coming {
            coming.push_all(Duration::from_millis(pause)).unwrap();
        }
        let got = asked.answer().unwrap();
        assert_eq!(got.completions, first.completions);
        assert_eq!(got.cached_tokens, second.cached_tokens);
    }
    // Another video behind the same text shares the text only.
    let (mut late, mut coming) = arriving(inputs);
    let mut coming = coming.remove(0);
    let frames = coming.frames.len();
    coming.frames.reverse();
    late.input_ids[0][0] = inputs.input_ids[0][0];
    let asked = ask(&service, late, &options(4));
    coming.push_all(Duration::from_millis(5)).unwrap();
    let got = asked.answer().unwrap();
    let text = inputs.input_ids[0].len() - 1;
    assert!(got.cached_tokens < text, "{} of {text}", got.cached_tokens);
    assert_eq!(service.stats().features_encoded, encoded, "{frames} known");
    nothing_is_held(&service);
}

#[test]
fn many_at_once_answer_as_each_alone_and_some_end_early() {
    let fixture = Fixture::new(&CASES);
    let ways = [
        options(9),
        GenerationOptions {
            num_beams: Some(3),
            ..options(6)
        },
    ];
    let alone: Vec<Vec<Generation>> = (ways.iter())
        .map(|way| (fixture.inputs.iter().map(|i| fixture.alone(i, way))).collect())
        .collect();
    for (cache_blocks, prefill_chunk) in [(None, 2048), (Some(40), 17)] {
        let service = fixture.service(EngineLimits {
            cache_blocks,
            prefill_chunk,
            batch: 12,
            ..EngineLimits::default()
        });
        let fixture = &fixture;
        let (service, ways, alone) = (&service, &ways, &alone);
        std::thread::scope(|scope| {
            for n in 0..40 {
                scope.spawn(move || {
                    let (way, case) = (n % 2, n / 2 % CASES.len());
                    let inputs = &fixture.inputs[case];
                    if n % 5 == 4 {
                        let asked = ask(service, inputs.clone(), &ways[way]);
                        let got = asked.answer().unwrap();
                        assert_eq!(got.completions, alone[way][case].completions);
                        return;
                    }
                    let (inputs, mut coming) = arriving(inputs);
                    let asked = ask(service, inputs, &ways[way]);
                    let pause = Duration::from_millis(n as u64 * 7 % 13);
                    let last = coming.pop().unwrap();
                    for coming in coming {
                        coming.push_all(pause).unwrap();
                    }
                    match n % 5 {
                        // The decoder breaks off.
                        0 => {
                            let mut last = last;
                            last.push().unwrap();
                            std::thread::sleep(pause);
                            last.feed.fail(Error::Media(format!("clip {n} is damaged")));
                            let error = asked.answer().unwrap_err();
                            assert_eq!(error.to_string(), format!("clip {n} is damaged"));
                        }
                        // Whoever asked goes away; the feed hears of it.
                        1 => {
                            let mut last = last;
                            last.push().unwrap();
                            service.cancel(asked.id);
                            let got = asked.answer().unwrap();
                            assert!(got.completions.iter().all(|c| c.ids.is_empty()));
                            let pushed = last.push();
                            assert!(matches!(pushed, Err(Error::Cancelled)), "{pushed:?}");
                        }
                        _ => {
                            last.push_all(pause).unwrap();
                            let got = asked.answer().unwrap();
                            assert_eq!(got.completions, alone[way][case].completions, "{n}");
                        }
                    }
                });
            }
        });
        nothing_is_held(service);
        let stats = service.stats();
        assert_eq!((stats.failed, stats.cancelled, stats.answered), (8, 8, 24));
    }
}

#[test]
fn a_feed_that_is_forgotten_ends_its_request() {
    let fixture = Fixture::new(&CASES);
    let service = fixture.service(EngineLimits::default());
    let (inputs, coming) = arriving(&fixture.inputs[3]);
    let asked = ask(&service, inputs, &options(3));
    drop(coming);
    let error = asked.answer().unwrap_err().to_string();
    assert!(error.contains("ended before its last frame"), "{error}");
    nothing_is_held(&service);
    // The same where it had ended before anybody asked.
    let (inputs, coming) = arriving(&fixture.inputs[0]);
    drop(coming);
    let asked = ask(&service, inputs, &options(3));
    asked.answer().unwrap_err();
    nothing_is_held(&service);
}

#[test]
fn a_call_waits_for_the_frames_and_a_forward_pass_does_not() {
    let fixture = Fixture::new(&CASES);
    for (case, inputs) in fixture.inputs.iter().enumerate() {
        let alone = fixture.alone(inputs, &options(10));
        let (late, coming) = arriving(inputs);
        let error = fixture
            .model
            .forward(&late, None, &ForwardOptions::default());
        let error = error.err().unwrap().to_string();
        assert!(error.contains("still being read"), "{error}");
        assert!(late.to_safetensors().is_err());
        let feeds = std::thread::spawn(move || {
            for coming in coming {
                coming.push_all(Duration::from_millis(3)).unwrap();
            }
        });
        let got = fixture.alone(&late, &options(10));
        feeds.join().unwrap();
        assert_eq!(got.completions, alone.completions, "case {case}");
    }
    let (late, mut coming) = arriving(&fixture.inputs[0]);
    coming[0].push().unwrap();
    let breaks = std::thread::spawn(move || drop(coming));
    let mut engine = fixture.engine(EngineLimits::default());
    let on_event = &mut |_| ControlFlow::Continue(());
    let error = engine
        .generate(&late, &options(3), &(), on_event)
        .unwrap_err();
    breaks.join().unwrap();
    assert!(
        error.to_string().contains("before its last frame"),
        "{error}"
    );
    assert_eq!(engine.blocks_in_use(), 0);
}

#[test]
fn frames_scaled_one_by_one_are_those_scaled_together() {
    let fixture = Fixture::new(&CASES);
    let clips = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/media");
    for name in ["h264.mp4", "h264-turned-90.mp4", "gif.gif"] {
        let limits = MediaLimits::default();
        let path = clips.join(name);
        let video = decode_video(path, FrameSampling::Default(5), &limits, None).unwrap();
        let whole = fixture.processor.scale_video(&video).unwrap().frames;
        let scaler = fixture.processor.frame_scaler(video.frames[0].size);
        let scaler = scaler.unwrap();
        let each = video.frames.iter().map(|f| scaler.scale(f).unwrap());
        let bits =
            |pixels: &Pixels| -> Vec<u32> { pixels.data.iter().map(|v| v.to_bits()).collect() };
        let one_by_one: Vec<u32> = each.flat_map(|pixels| bits(&pixels)).collect();
        assert!(one_by_one == bits(&whole), "{name}");
    }
}

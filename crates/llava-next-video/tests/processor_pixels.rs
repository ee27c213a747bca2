//! Resizing and preprocessing against hashes of what Pillow, torchvision and Transformers 4.53.3 return
//! (`testdata/processor`, made by `make.py` there).
#![allow(clippy::unwrap_used)]

use llava_next_video::media::{Image, ImageSize, Video, VideoMetadata};
use llava_next_video::processor::image_processor::LlavaNextImageProcessor;
use llava_next_video::processor::resize::{Arithmetic, Resample, Resizer, Span};
use llava_next_video::processor::settings::TargetSize;
use llava_next_video::processor::video_processor::{LlavaNextVideoVideoProcessor, sample_frames};
use proptest::prelude::*;
use serde_json::Value;

fn cases(file: &str) -> Vec<Value> {
    let path = format!(
        "{}/../../testdata/processor/{file}",
        env!("CARGO_MANIFEST_DIR")
    );
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    json["cases"].as_array().unwrap().clone()
}

/// The generator of `make.py`.
fn picture(seed: u64, height: usize, width: usize) -> Image {
    let mut state = seed as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let data = (0..height * width * 3).map(|_| next()).collect();
    Image {
        size: ImageSize::new(height, width),
        data,
    }
}

fn video(frames: Vec<Image>) -> Video {
    Video {
        frames_indices: (0..frames.len()).collect(),
        timestamps: vec![0.0; frames.len()],
        metadata: VideoMetadata {
            total_num_frames: frames.len(),
            fps: 4.0,
            duration: 0.5,
        },
        notes: vec![],
        frames,
    }
}

fn fnv(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3)
    });
    format!("{hash:016x}")
}

fn arithmetic(value: &Value) -> Arithmetic {
    match value.as_str().unwrap() {
        "pillow" => Arithmetic::Pillow,
        _ => Arithmetic::Torchvision,
    }
}

fn size(case: &Value, at: usize) -> ImageSize {
    ImageSize::new(
        case[at].as_u64().unwrap() as usize,
        case[at + 1].as_u64().unwrap() as usize,
    )
}

#[test]
fn resizing_gives_the_bytes_of_pillow_and_torchvision() {
    let mut wrong = vec![];
    for case in cases("resize.json") {
        let filter = Resample::from_number(case[1].as_u64().unwrap()).unwrap();
        let (from, to) = (size(&case, 3), size(&case, 5));
        let source = picture(case[2].as_u64().unwrap(), from.height, from.width);
        let resizer = Resizer::whole(from, to, filter, arithmetic(&case[0])).unwrap();
        if fnv(&resizer.resize(&source).unwrap().data) != case[7].as_str().unwrap() {
            wrong.push(case);
        }
    }
    assert!(wrong.is_empty(), "{} differ: {wrong:?}", wrong.len());
}

#[test]
fn images_give_the_floats_of_both_image_processors() {
    let mut wrong = vec![];
    for case in cases("images.json") {
        let settings = case[1].as_object().unwrap();
        let processor =
            LlavaNextImageProcessor::from_json(settings, arithmetic(&case[0]), "x").unwrap();
        let from = size(&case, 3);
        let image = picture(case[2].as_u64().unwrap(), from.height, from.width);
        let input = processor.preprocess(&[image], 5).unwrap().remove(0);
        let got = (
            input.tiles.count,
            fnv(bytemuck::cast_slice(&input.tiles.data)),
        );
        assert_eq!(input.tiles.count, input.layout.tiles);
        if got
            != (
                case[5][0].as_u64().unwrap() as usize,
                case[6].as_str().unwrap().to_owned(),
            )
        {
            wrong.push(case);
        }
    }
    assert!(wrong.is_empty(), "{} differ: {wrong:?}", wrong.len());
}

#[test]
fn videos_give_the_floats_of_both_video_processors() {
    let mut wrong = vec![];
    for case in cases("videos.json") {
        let settings = case[1].as_object().unwrap();
        let processor =
            LlavaNextVideoVideoProcessor::from_json(settings, arithmetic(&case[0]), "x").unwrap();
        let (from, seed) = (size(&case, 3), case[2].as_u64().unwrap());
        let frames = (0..2)
            .map(|i| picture(seed + i, from.height, from.width))
            .collect();
        let input = processor.preprocess(&[video(frames)]).unwrap().remove(0);
        assert_eq!(input.frames.size, size(&case[5], 2));
        if fnv(bytemuck::cast_slice(&input.frames.data)) != case[6].as_str().unwrap() {
            wrong.push(case);
        }
    }
    assert!(wrong.is_empty(), "{} differ: {wrong:?}", wrong.len());
}

#[test]
fn the_short_side_of_a_frame_is_resized_as_in_the_reference() {
    let settings = serde_json::json!({"size": 336, "do_center_crop": false});
    let processor = LlavaNextVideoVideoProcessor::from_json(
        settings.as_object().unwrap(),
        Arithmetic::Torchvision,
        "x",
    )
    .unwrap();
    for case in cases("video_sizes.json") {
        let plan = processor.settings.plan(size(&case, 0)).unwrap();
        assert_eq!(plan.output, size(&case, 2), "{case}");
    }
}

#[test]
fn settings_take_every_spelling_of_a_size() {
    let read = |json: Value| {
        LlavaNextVideoVideoProcessor::from_json(
            json.as_object().unwrap(),
            Arithmetic::Torchvision,
            "v.json",
        )
    };
    use llava_next_video::processor::settings::TargetSize::{Exact, ShortestEdge};
    let settings = read(serde_json::json!({"size": 42, "crop_size": 84}))
        .unwrap()
        .settings;
    assert_eq!(
        (settings.size, settings.crop_size),
        (ShortestEdge(42), ImageSize::square(84))
    );
    let settings = read(serde_json::json!({"size": [4, 5], "crop_size": [6, 7]}))
        .unwrap()
        .settings;
    assert_eq!(
        (settings.size, settings.crop_size),
        (Exact(ImageSize::new(4, 5)), ImageSize::new(6, 7))
    );
    let settings = read(serde_json::json!({"size": null, "image_mean": 0.5}))
        .unwrap()
        .settings;
    assert_eq!(
        (settings.size, settings.image_mean),
        (ShortestEdge(224), [0.5; 3])
    );
    for (wrong, part) in [
        (
            serde_json::json!({"size": {"longest_edge": 4}}),
            "v.json: size is {\"longest_edge\":4}",
        ),
        (serde_json::json!({"size": -1}), "size is -1"),
        (serde_json::json!({"crop_size": 0}), "crop_size is 0"),
        (serde_json::json!({"resample": 9}), "resample is 9"),
        (
            serde_json::json!({"do_resize": "yes"}),
            "do_resize is \"yes\"",
        ),
        (
            serde_json::json!({"image_std": [0, 1, 1]}),
            "image_std is [0,1,1]",
        ),
        (
            serde_json::json!({"image_mean": [1, 2]}),
            "image_mean is [1,2]",
        ),
    ] {
        let message = read(wrong).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn class_defaults_with_their_own_pinpoints_give_ragged_tiles() {
    let processor = LlavaNextImageProcessor::class_default(Arithmetic::Pillow);
    let input = processor
        .preprocess(&[picture(1, 672, 672)], 14)
        .unwrap()
        .remove(0);
    assert_eq!(
        (input.tiles.count, input.tiles.size),
        (10, ImageSize::square(224))
    );
}

#[test]
fn sampling_follows_the_integer_formula() {
    let meta = |fps| VideoMetadata {
        total_num_frames: 0,
        fps,
        duration: 0.0,
    };
    assert_eq!(
        sample_frames(100, Some(8), None, None).unwrap(),
        [0, 12, 25, 37, 50, 62, 75, 87]
    );
    assert_eq!(
        sample_frames(10, Some(4), None, None).unwrap(),
        [0, 2, 5, 7]
    );
    assert_eq!(
        sample_frames(17, Some(7), None, None).unwrap(),
        [0, 2, 4, 7, 9, 12, 14]
    );
    assert_eq!(
        sample_frames(8, None, Some(3.0), Some(&meta(4.0)))
            .unwrap()
            .len(),
        6
    );
    assert_eq!(sample_frames(8, None, None, None).unwrap().len(), 8);
    assert_eq!(
        sample_frames(8, None, Some(0.001), Some(&meta(25.0))).unwrap(),
        [0]
    );
    for (result, part) in [
        (
            sample_frames(8, Some(10), None, None),
            "10 frames were asked for, but the video has 8",
        ),
        (
            sample_frames(8, None, Some(3.0), None),
            "frame rate is not known",
        ),
        (sample_frames(8, Some(1), Some(1.0), None), "give one"),
        (sample_frames(8, Some(0), None, None), "at least one"),
        (
            sample_frames(8, None, Some(f64::NAN), Some(&meta(4.0))),
            "above 0",
        ),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn settings_decide_whether_frames_are_sampled() {
    let mut processor = LlavaNextVideoVideoProcessor::class_default(Arithmetic::Torchvision);
    assert_eq!(
        processor.frames_indices(8, None, None, None).unwrap().len(),
        8
    );
    assert_eq!(
        processor.frames_indices(8, Some(3), None, None).unwrap(),
        [0, 2, 5]
    );
    processor.num_frames = Some(2);
    assert_eq!(
        processor.frames_indices(8, None, None, None).unwrap().len(),
        8
    );
    processor.do_sample_frames = true;
    assert_eq!(
        processor.frames_indices(8, None, None, None).unwrap(),
        [0, 4]
    );
}

#[test]
fn frames_of_different_sizes_are_refused() {
    let processor = LlavaNextVideoVideoProcessor::class_default(Arithmetic::Torchvision);
    let message = processor
        .preprocess(&[video(vec![picture(1, 4, 4), picture(1, 4, 5)])])
        .unwrap_err()
        .to_string();
    assert!(message.contains("must be of one size"), "{message}");
    assert!(processor.preprocess(&[video(vec![])]).is_err());
}

#[test]
fn torchvision_has_no_lanczos() {
    let resizer = Resizer::whole(
        ImageSize::square(4),
        ImageSize::square(5),
        Resample::Lanczos,
        Arithmetic::Torchvision,
    );
    assert!(resizer.unwrap_err().to_string().contains("bicubic"));
}

proptest! {
    /// A window of a resized picture is the same part of the whole resized picture.
    #[test]
    fn a_window_is_a_part_of_the_whole(
        (h, w, th, tw) in (1_usize..40, 1_usize..40, 1_usize..40, 1_usize..40),
        (a, b, c, d) in (0_usize..40, 0_usize..40, 0_usize..40, 0_usize..40),
        filter in 0_u64..6,
        torch in any::<bool>(),
    ) {
        let torch = torch && matches!(filter, 0 | 2 | 3);
        let arithmetic = if torch { Arithmetic::Torchvision } else { Arithmetic::Pillow };
        let filter = Resample::from_number(filter).unwrap();
        let source = picture(7, h, w);
        let (from, to) = (source.size, ImageSize::new(th, tw));
        let rows = Span { start: a % th, length: 1 + b % (th - a % th) };
        let columns = Span { start: c % tw, length: 1 + d % (tw - c % tw) };
        let whole = Resizer::whole(from, to, filter, arithmetic).unwrap().resize(&source).unwrap();
        let part = Resizer::new(from, to, (rows, columns), filter, arithmetic).unwrap().resize(&source).unwrap();
        for y in 0..rows.length {
            let row = ((rows.start + y) * tw + columns.start) * 3;
            prop_assert_eq!(&part.data[y * columns.length * 3..][..columns.length * 3], &whole.data[row..][..columns.length * 3]);
        }
    }

    /// A picture of one colour stays that colour.
    #[test]
    fn one_colour_stays(h in 1_usize..30, w in 1_usize..30, th in 1_usize..30, tw in 1_usize..30, byte: u8) {
        for arithmetic in [Arithmetic::Pillow, Arithmetic::Torchvision] {
            let source = Image { size: ImageSize::new(h, w), data: vec![byte; h * w * 3] };
            let to = ImageSize::new(th, tw);
            let out = Resizer::whole(source.size, to, Resample::Bicubic, arithmetic).unwrap().resize(&source).unwrap();
            prop_assert!(out.data.iter().all(|&b| b == byte));
        }
    }
}

/// `cargo test --release --test processor_pixels -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, not a check"]
fn time_eight_frames_of_720p_on_one_thread() {
    let frame = picture(3, 720, 1280);
    let from = frame.size;
    let best = |work: &dyn Fn()| {
        let times = (0..20).map(|_| {
            let start = std::time::Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        });
        times.fold(f64::INFINITY, f64::min)
    };
    for arithmetic in [Arithmetic::Torchvision, Arithmetic::Pillow] {
        let whole = Resizer::whole(
            from,
            ImageSize::new(336, 597),
            Resample::Bicubic,
            arithmetic,
        )
        .unwrap();
        let resize = best(&|| (0..8).for_each(|_| drop(whole.resize(&frame).unwrap())));
        let settings = serde_json::json!({"size": 336, "crop_size": 336});
        let processor =
            LlavaNextVideoVideoProcessor::from_json(settings.as_object().unwrap(), arithmetic, "x")
                .unwrap();
        let video = [video(vec![frame.clone(); 8])];
        let process = best(&|| drop(processor.preprocess(&video).unwrap()));
        println!(
            "{arithmetic:?}: resize whole, one thread {resize:.1} ms; whole processor, all threads {process:.1} ms"
        );
    }
}

#[test]
fn frames_that_were_made_smaller_beforehand_become_the_same() {
    let mut processor = LlavaNextVideoVideoProcessor::class_default(Arithmetic::Torchvision);
    let mut shrunk = 0;
    for arithmetic in [Arithmetic::Torchvision, Arithmetic::Pillow] {
        for resample in [Resample::Nearest, Resample::Bilinear, Resample::Bicubic] {
            let shortest = TargetSize::ShortestEdge(48);
            for size in [shortest, TargetSize::Exact(ImageSize::new(40, 60))] {
                let settings = &mut processor.settings;
                settings.crop_size = ImageSize::square(48);
                (settings.arithmetic, settings.resample, settings.size) =
                    (arithmetic, resample, size);
                for (height, width) in [(49, 49), (97, 171), (171, 96), (48, 600), (20, 31)] {
                    let frame = picture(7, height, width);
                    let resizing = processor.settings.resizing().unwrap();
                    let Some(resizer) = resizing.shrinking(frame.size).unwrap() else {
                        continue;
                    };
                    let small = resizer.resize(&frame).unwrap();
                    assert!(small.data.len() < frame.data.len());
                    let of = |frame| processor.preprocess(&[video(vec![frame])]).unwrap();
                    assert_eq!(of(small), of(frame), "{resizing:?} {height} x {width}");
                    shrunk += 1;
                }
            }
        }
    }
    assert_eq!(shrunk, 42);
    processor.settings.do_resize = false;
    assert_eq!(processor.settings.resizing(), None);
}

//! The processor with LLaMA's real vocabulary, which `tools/gates/llama_vocab.sh` fetches and names in
//! `LNV_LLAMA_VOCAB`. The ids are those of Transformers' own tests.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use llava_next_video::config::CheckpointFiles;
use llava_next_video::media::{Image, ImageSize, Video, VideoMetadata};
use llava_next_video::processor::conversation::{Content, Message, Role};
use llava_next_video::processor::{LlavaNextVideoProcessor, ModelFacts, ProcessOptions};

const WHY: [u32; 18] = [
    1, 3148, 1001, 29901, 29871, 32000, 13, 11008, 338, 445, 4863, 2090, 1460, 29973, 319, 1799,
    9047, 13566,
];

fn processor() -> LlavaNextVideoProcessor {
    let folder = std::env::var_os("LNV_LLAMA_VOCAB")
        .expect("LNV_LLAMA_VOCAB: run tools/gates/llama_vocab.sh");
    let facts = ModelFacts {
        text_model_type: "llama".into(),
        image_size: 336,
        patch_size: 14,
        has_cls: true,
        vision_feature_select_strategy: "default".into(),
        image_token_id: 32001,
        video_token_id: 32000,
        spatial_pool_stride: 2,
        image_grid_pinpoints: [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
            .map(|(h, w)| ImageSize::new(h, w))
            .to_vec(),
    };
    let files = CheckpointFiles::open(&PathBuf::from(folder)).unwrap();
    LlavaNextVideoProcessor::from_files(&files, &facts).unwrap()
}

fn image(height: usize, width: usize) -> Image {
    Image {
        size: ImageSize::new(height, width),
        data: vec![9; height * width * 3],
    }
}

#[test]
#[ignore = "needs LLaMA's vocabulary: tools/gates/llama_vocab.sh"]
fn prompts_have_the_published_ids() {
    let processor = processor();
    let ask = |text: &str| {
        let content = vec![Content::Text(text.into()), Content::Video(None)];
        processor
            .render(&[Message::new(Role::User, content)], true, false)
            .unwrap()
    };
    let why = ask("Why is this video funny?");
    assert_eq!(why, "USER: <video>\nWhy is this video funny? ASSISTANT:");
    let mut want = WHY.to_vec();
    want.push(29901);
    assert_eq!(processor.tokenizer.encode(&why, true).unwrap(), want);
    let shown = processor
        .tokenizer
        .encode(&ask("What is shown in this video?"), true)
        .unwrap();
    let want = [
        1, 3148, 1001, 29901, 29871, 32000, 13, 5618, 338, 4318, 297, 445, 4863, 29973, 319, 1799,
        9047, 13566, 29901,
    ];
    assert_eq!(shown, want);
}

#[test]
#[ignore = "needs LLaMA's vocabulary: tools/gates/llama_vocab.sh"]
fn eight_frames_and_a_picture_have_the_published_lengths() {
    let processor = processor();
    let frames = vec![image(360, 640); 8];
    let video = Video {
        frames_indices: vec![0; 8],
        timestamps: vec![0.0; 8],
        metadata: VideoMetadata {
            total_num_frames: 243,
            fps: 30.0,
            duration: 8.1,
        },
        notes: vec![],
        frames,
    };
    let text = "USER: <video>\nWhy is this video funny? ASSISTANT:".to_owned();
    let inputs = processor
        .process(&[text], &[], &[video], &ProcessOptions::default())
        .unwrap();
    assert_eq!(inputs.input_ids[0].len(), 18 + 8 * 144);
    assert_eq!(
        inputs.input_ids[0]
            .iter()
            .filter(|&&id| id == 32000)
            .count(),
        1152
    );
    let inputs = processor
        .process(
            &["<image>".into()],
            &[image(480, 640)],
            &[],
            &ProcessOptions::default(),
        )
        .unwrap();
    assert_eq!(
        inputs.input_ids[0]
            .iter()
            .filter(|&&id| id == 32001)
            .count(),
        2340
    );
}

#[test]
#[ignore = "needs LLaMA's vocabulary: tools/gates/llama_vocab.sh"]
fn text_comes_back_whole_and_streamed() {
    let processor = processor();
    let text = "USER: \nWhy?  Größe, 你好 🎉🦙 — don't\tstop\n ASSISTANT: ok";
    let ids = processor.tokenizer.encode(text, true).unwrap();
    assert_eq!(processor.decode(&ids, true, None).unwrap(), text);
    let mut detokenizer = processor.detokenizer(true);
    let mut streamed: String = ids.iter().filter_map(|&id| detokenizer.push(id)).collect();
    streamed.extend(detokenizer.flush());
    assert_eq!(streamed, text);
}

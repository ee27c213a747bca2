//! Chat templates: any text renders a conversation within the bounds, or gives an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::processor::chat_template::{ChatTemplate, TemplateOptions};
use llava_next_video::processor::conversation::ConversationFile;

const CONVERSATION: &str = r#"[
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "video"}, {"type": "image"},
                                 {"type": "text", "text": "Why is this funny?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is not."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}
]"#;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, "fuzz") else {
        return;
    };
    let file = ConversationFile::parse(CONVERSATION).expect("a conversation");
    let tokens = serde_json::Map::from_iter([("bos_token".to_owned(), "<s>".into())]);
    for (prompt, spans) in [(true, false), (false, true)] {
        let options = TemplateOptions {
            add_generation_prompt: prompt,
            return_assistant_spans: spans,
            ..TemplateOptions::default()
        };
        if let Ok(rendered) = template.render(&file.conversations[0].messages, &tokens, &options) {
            let characters = rendered.text.chars().count();
            assert!(rendered.assistant_spans.iter().all(|s| s.end <= characters));
        }
    }
});

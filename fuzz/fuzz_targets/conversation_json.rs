//! Conversation files: any text gives conversations within the limits, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::processor::conversation::{
    ConversationFile, MAX_CONVERSATIONS, MAX_MESSAGES,
};

fuzz_target!(|text: &str| {
    let Ok(file) = ConversationFile::parse(text) else {
        return;
    };
    assert!(file.batched || file.conversations.len() == 1);
    assert!(file.conversations.len() <= MAX_CONVERSATIONS);
    for conversation in &file.conversations {
        assert!(conversation.messages.len() <= MAX_MESSAGES);
        let _ = conversation.images().count() + conversation.videos().count();
    }
});

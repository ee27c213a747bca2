//! The templates of the three published families, for checkpoints that ship none.

use std::fmt;

use super::super::tokenizer::Tokenizer;

/// A family of prompt formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `USER: ... ASSISTANT:`: the 7B and 7B-DPO checkpoints.
    Vicuna,
    /// `[INST] ... [/INST]`: the 7B-32K checkpoint.
    Mistral,
    /// `<|im_start|>user ... <|im_end|>`: the 34B checkpoints.
    ChatMl,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vicuna => "vicuna",
            Self::Mistral => "mistral",
            Self::ChatMl => "ChatML",
        })
    }
}

impl Family {
    /// The family that a text backbone was most likely trained with: ChatML where the tokenizer has its
    /// tokens, mistral by `model_type`, else vicuna.
    pub fn guess(text_model_type: &str, tokenizer: &Tokenizer) -> Self {
        if tokenizer.token_to_id("<|im_start|>").is_some() || text_model_type == "qwen2" {
            Self::ChatMl
        } else if text_model_type == "mistral" {
            Self::Mistral
        } else {
            Self::Vicuna
        }
    }

    /// The template: media first, each followed by a newline, then the texts.
    pub fn source(self) -> &'static str {
        match self {
            Self::Vicuna => VICUNA,
            Self::Mistral => MISTRAL,
            Self::ChatMl => CHATML,
        }
    }
}

const VICUNA: &str = r"{% for message in messages -%}
{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | list -%}
{% if message['role'] == 'system' -%}
{% for part in texts %}{{ part['text'] + ' ' }}{% endfor -%}
{% else -%}
{{ message['role'].upper() + ': ' -}}
{% for kind in ['image', 'video'] -%}
{% for part in message['content'] | selectattr('type', 'equalto', kind) %}{{ '<' + kind + '>\n' }}{% endfor -%}
{% endfor -%}
{% for part in texts %}{{ part['text'] + ' ' }}{% endfor -%}
{% endif -%}
{% endfor -%}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
";

// The backslash in `<\s>` is the converter's; it stays, so that prompts are the published ones.
const MISTRAL: &str = r"{% for message in messages -%}
{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | list -%}
{% if message['role'] == 'user' -%}
{{ '[INST] ' -}}
{% for kind in ['image', 'video'] -%}
{% for part in message['content'] | selectattr('type', 'equalto', kind) %}{{ '<' + kind + '>\n' }}{% endfor -%}
{% endfor -%}
{% for part in texts %}{{ part['text'] }}{% endfor -%}
{{ ' [/INST]' -}}
{% elif message['role'] == 'assistant' -%}
{{ ' ' + texts[0]['text'] + '<\\s> ' -}}
{% else -%}
{{ raise_exception('Only user and assistant roles are supported!') -}}
{% endif -%}
{% endfor -%}
";

const CHATML: &str = r"{% for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' -}}
{% for kind in ['image', 'video'] -%}
{% for part in message['content'] | selectattr('type', 'equalto', kind) %}{{ '<' + kind + '>\n' }}{% endfor -%}
{% endfor -%}
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor -%}
{{ '<|im_end|>\n' -}}
{% endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
";

"""Chat template renderings."""

import copy

from transformers.utils.chat_template_utils import render_jinja_template

import templates
from conversations import SYSTEM, assistant, image, text, user, video
from functions.store import write_json

FOUR_TURNS = [
    SYSTEM,
    user(text("What’s shown in this image?"), {"type": "image"}),
    assistant("This image shows a red stop sign."),
    user(text("Why is this video funny?"), {"type": "video"}),
]
CONVERSATIONS = {
    "four-turns": FOUR_TURNS,
    "without-system": FOUR_TURNS[1:],
    "text": [user(text("Hi  there \n"))],
    "two-texts": [user(text("One."), image("a.png"), text("Two."), video("b.mp4"), image("c.png"))],
    "assistant-last": [user(text("Describe the picture.")), assistant("There are ")],
    "string-content": [{"role": "user", "content": "plain"}],
    "empty-text": [user(text(""))],
    "tool-role": [user(text("a")), {"role": "tool", "content": [text("b")]}],
}
OTHERS = {
    "llama2-system": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'][0]['text'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set words = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + words %}"
        "{% else %}{% set content = words %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{%- set ns = namespace(images=0, videos=0) %}\n{%- for message in messages %}\n    {%- for part in message.content if part is mapping %}\n"
        "        {%- if part.type == 'image' %}{% set ns.images = ns.images + 1 %}\n{{- 'Picture ' ~ ns.images ~ ': <image>\\n' }}\n"
        "        {%- elif part.type == 'video' %}{% set ns.videos = ns.videos + 1 %}{{ '<video>' | upper | lower }}\n"
        "        {%- elif 'text' in part %}{{ part.text | trim }}{% endif %}\n    {%- endfor %}\n    {%- if not loop.last %}{{ '|' }}{% endif %}\n"
        "{%- endfor %}\n{{- '#' ~ ns.images ~ '/' ~ ns.videos }}"
    ),
    "macro": (
        "{% macro show(part, depth=1) %}{{ '  ' * depth }}{{ part.type }}={{ part.get('text', 'none') | tojson }}{% endmacro %}"
        "{% for message in messages %}{{ message.role.title() }}[{{ message.content | length }}]\n"
        "{% for part in message.content %}{% if loop.index > 2 %}{% break %}{% endif %}{{ show(part, depth=loop.index) }}\n{% endfor %}{% endfor %}"
        "{{ messages[-1]['role'][:4] }}{{ messages[::-1][0].role }}{{ 'yes' if add_generation_prompt else 'no' }}"
    ),
    "continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}{{ m.role.startswith('u') }}"
        "{{ m.content[0].text.split(' ')[0] if m.content[0].text is defined else None }};{% else %}nothing{% endfor %}{{ undefined_thing }}"
    ),
    "lines": "first\n  {% if true %}\n    kept\n  {% endif %}\n{{ messages[0].role }}\n{# comment #}\nlast\n",
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
OPTIONS = [{}, {"add_generation_prompt": True}, {"continue_final_message": True}]


def render(template, conversation, options):
    want_spans = "generation %}" in template and not options.get("continue_final_message")
    arguments = {**options, "return_assistant_tokens_mask": want_spans, **TOKENS}
    try:
        texts, spans = render_jinja_template([copy.deepcopy(conversation)], chat_template=template, **arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": texts[0], **({"assistant_spans": [list(s) for s in spans[0]]} if want_spans else {})}


def make(folder):
    everything = {**templates.NAMED, **OTHERS}
    entries = [
        {"template": name, "conversation": key, "options": options, **render(template, conversation, options)}
        for name, template in everything.items()
        for key, conversation in CONVERSATIONS.items()
        for options in OPTIONS
        if not (options.get("continue_final_message") and key not in ("assistant-last", "without-system", "text"))
    ]
    write_json(
        folder / "templates.json",
        "Renderings of chat templates by Transformers' Jinja environment. `text`: the rendering; `error`: the reference raised (compare that "
        "there is an error; a raise_exception text must be part of the message); `assistant_spans`: character ranges of generation blocks.",
        special_tokens=TOKENS,
        templates=everything,
        conversations=CONVERSATIONS,
        entries=entries,
    )

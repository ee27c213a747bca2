"""Chat templates of the three published families (media first, each followed by a newline, then the texts)."""

MEDIA = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
)
TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ message['content'][0]['text'] + ' ' }}"
    "{% else %}"
    "{{ message['role'].upper() + ': ' }}" + MEDIA +
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}" + MEDIA + TEXTS + "{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '<\\\\s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}" + MEDIA + TEXTS + "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The same rendering as CHATML written over several indented lines: exercises trim_blocks, lstrip_blocks, whitespace
# control, loop variables and tests.
CHATML_LINES = """{#- media first, then text -#}
{% for message in messages %}
    {%- if loop.first and message.role != 'system' and use_default_system is defined and use_default_system %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for kind in ['image', 'video'] %}
            {%- for content in message.content if content.type == kind %}
                {{- '<' ~ kind ~ '>\\n' }}
            {%- endfor %}
        {%- endfor %}
        {%- for content in message.content if content.type == 'text' %}
            {{- content.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}"""

# As VICUNA, with the bos token inside the template (the processor must not add a second one) and a generation block.
VICUNA_BOS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' }}{% generation %}{{ message['content'][0]['text'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ 'USER: ' }}" + MEDIA +
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# The converter's own vicuna text: no videos, and the system text comes out twice.
VICUNA_CONVERTER = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}"
    "{% else %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

NAMED = {
    "vicuna": VICUNA,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "chatml_lines": CHATML_LINES,
    "vicuna_bos": VICUNA_BOS,
    "vicuna_converter": VICUNA_CONVERTER,
}

"""Chat templates in the manner of a dozen model families, written down short, and what each puts before an answer.

Each has what makes its family special: roles, separators, where a system message goes, what is added for `generate`.
"""

from __future__ import annotations

_SYSTEM_APART = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"  # noqa: E501
_CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TEMPLATES: dict[str, tuple[str, str]] = {
    "chatml": (_CHATML + _CHATML_END, "<|im_start|>assistant\n"),
    "qwen": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        + _CHATML
        + _CHATML_END,
        "<|im_start|>assistant\n",
    ),
    "qwen3": (  # thinking is shown in the last answer only
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m['content'] }}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + _CHATML_END,
        "<|im_start|>assistant\n",
    ),
    "llama-2": (  # nothing is added for generate
        _SYSTEM_APART + "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}",
        "[/INST]",
    ),
    "llama-3": (
        "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (  # a system message goes before the last question, wherever that is
        _SYSTEM_APART + "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if system and loop.revindex "
        "<= 2 %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
        "{% endfor %}",
        "[/INST]",
    ),
    "gemma": (
        "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<start_of_turn>model\n",
    ),
    "phi-3": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "<|assistant|>\n",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
        "<|assistant|>\n",
    ),
    "deepseek": (
        "<bos>{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
        "{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}</s>{% else %}{{ m['content'] }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        "Assistant:",
    ),
    "command-r": (
        "<bos>{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m['role'] == 'assistant' %}<|CHATBOT_TOKEN|>"
        "{% elif m['role'] == 'user' %}<|USER_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{% endif %}{{ m['content'] }}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "olmo": (
        "<bos>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
        "<|assistant|>\n",
    ),
    "granite": (
        "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "falcon": (
        "{% for m in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ m['role'] | capitalize }}: "
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
        "\n\nAssistant:",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% elif m['role'] == 'assistant' "
        "%}ASSISTANT: {{ m['content'] }}</s>{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "ASSISTANT:",
    ),
}
SPECIAL = (  # noqa: SIM905
    "<s> </s> <bos> <|im_start|> <|im_end|> <think> </think> <|begin_of_text|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> <|end|> <|endoftext|> "
    "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|> "
    "<|start_of_role|> <|end_of_role|> <|end_of_text|>"
).split()

"""Which token ends a turn, for chat templates of every kind."""

from __future__ import annotations

import pytest

from recap_fast.model.chat_template import turn_end_id
from tests.tiny_tokenizer import CHATML, tiny_tokenizer

INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part is mapping %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
LAST_ONLY = (
    "{% for m in messages %}{{ m.content }}{% if loop.last %}<end>{% else %}<|im_end|>"
    "{% endif %}{% endfor %}"
)


def tokenizer_with(template, special=(), added=()):
    tokenizer = tiny_tokenizer(template, end="</s>")
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (INST, "</s>"),
        (PARTS, "<|im_end|>"),
        (LAST_ONLY, "<end>"),
        # The end of a document after the end of a turn (Phi-3), and what opens the next turn.
        ("{% for m in messages %}{{ m.content }}<end>\n{% endfor %}</s>", "<end>"),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), "<|im_end|>"),
        ("{% for m in messages %}{{ m.content | trim }} <end>{% endfor %}", "<end>"),
        ("{% for m in messages %}{{ m.content }}<added>\n{% endfor %}", "<added>"),
        ("{% for m in messages %}{{ m.content }}<added><end>{% endfor %}", "<end>"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "</s>"),
    ],
)
def test_end_of_a_turn(template, end):
    tokenizer = tokenizer_with(template, ["<end>"], ["<added>"])
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }} [END]\n{% endfor %}",  # seven ordinary tokens
        "{% for m in messages %}{{ m.content }}.{% endfor %}",  # one, which answers have too
        "{{ messages[0].content }}<|im_end|>",  # writes no assistant's turn
        "{{ raise_exception('no') }}",
        "{{ messages[7].content.x }}",
    ],
)
def test_no_token_ends_a_turn(template):
    assert turn_end_id(tokenizer_with(template)) is None

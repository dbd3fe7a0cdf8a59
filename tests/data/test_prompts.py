from __future__ import annotations

import pytest

from recap_fast.data.prompts import (
    TEMPLATES,
    ChatRenderer,
    count_markers,
    fill,
    place_images,
    resolve_template,
)
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.vision_rows import END, IMAGE, START, VIDEO, vision_tokenizer, vision_tokens

USER = [{"role": "user", "content": "1+1?"}]


def text_of(tokenizer, token_ids):
    return tokenizer.decode(token_ids)


def test_templates_are_the_papers():
    assert fill(TEMPLATES["plain"], question="Q") == "Q"
    assert fill(TEMPLATES["thinking"], question="Q") == (
        "Q Output the thinking process in <think> </think> and final answer in <answer> </answer> "
        "tags."
    )
    assert (
        fill(TEMPLATES["answer"], question="Q") == "Q Output the answer in <answer> </answer> tags."
    )
    assert fill(TEMPLATES["box"], question="Q") == (
        "Q The output answer format should be as follows: <answer>[x1, y1, x2, y2]</answer>"
    )


def test_template_by_name_or_text():
    assert resolve_template("answer") == TEMPLATES["answer"]
    assert resolve_template("Solve: {question}") == "Solve: {question}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("anser", "did you mean 'answer'"),
        ("no placeholder", "{question}"),
        ("{answer}", "question"),
    ],
)
def test_unusable_template_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve_template(wrong)


def test_other_braces_survive():
    assert fill("{question} in \\boxed{}", question="{x}") == "{x} in \\boxed{}"


def test_prompt_is_the_chat_templates():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "be brief"}, *USER]
    token_ids = ChatRenderer(tokenizer).prompt(messages)
    assert text_of(tokenizer, token_ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", ["{{ bos_token }}" + CHATML, None], ids=["chat", "plain"])
def test_one_bos(template):
    tokenizer = tiny_tokenizer(template, adds_bos=True)
    renderer = ChatRenderer(tokenizer)
    for token_ids in (renderer.prompt(USER), renderer.supervised(USER, "2")[0]):
        assert token_ids.count(tokenizer.bos_token_id) == 1
        assert token_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_no_bos_where_the_tokenizer_adds_none(template):
    tokenizer = tiny_tokenizer(template)
    assert tokenizer.bos_token_id not in ChatRenderer(tokenizer).prompt(USER)


def test_thinking_switch_reaches_templates_that_know_it():
    tokenizer = tiny_tokenizer()
    closed = "<think>\n\n</think>\n\n"
    assert text_of(tokenizer, ChatRenderer(tokenizer, False).prompt(USER)).endswith(closed)
    assert closed not in text_of(tokenizer, ChatRenderer(tokenizer, True).prompt(USER))
    deaf = tiny_tokenizer("{{ messages[-1]['content'] }}")
    assert text_of(deaf, ChatRenderer(deaf, False).prompt(USER)) == "1+1?"


@pytest.mark.parametrize(
    ("template", "thinking", "target_text"),
    [
        (CHATML, None, "2<|im_end|>"),
        (CHATML, False, "2<|im_end|>"),  # its prompt is not how its finished turns begin
        ("{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}", None, "2</s>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None, "2<|im_end|>"),
        ("{% for m in messages %} {{ m['content'] | trim }}{% endfor %}", None, " 2<|im_end|>"),
        (None, None, "2<|im_end|>"),
    ],
    ids=["chatml", "closed-thought", "eos-newline", "no-end", "opens-with-space", "plain"],
)
def test_supervised_row_is_prompt_then_target_then_end(template, thinking, target_text):
    tokenizer = tiny_tokenizer(template)
    renderer = ChatRenderer(tokenizer, thinking)
    token_ids, num_prompt_tokens = renderer.supervised(USER, "2")
    assert token_ids[:num_prompt_tokens] == renderer.prompt(USER)
    assert text_of(tokenizer, token_ids[num_prompt_tokens:]) == target_text


@pytest.mark.parametrize(
    ("template", "target_text"),
    [
        ("{% for m in messages %}{{ m['content'] }} [END]\n{% endfor %}", "2 [END]</s>"),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}</s>", "2<|im_end|>"),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), "2<|im_end|>"),
    ],
    ids=["text", "two-marks", "permanent-generation-prompt"],
)
def test_target_ends_with_one_token_that_stops(template, target_text):
    tokenizer = tiny_tokenizer(template, end="</s>")
    token_ids, num_prompt_tokens = ChatRenderer(tokenizer).supervised(USER, "2")
    assert text_of(tokenizer, token_ids[num_prompt_tokens:]) == target_text


# -- templates that open the thought

_ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"


def thinking(opening, finished):
    """A template that ends prompts with `opening`, and writes finished turns in its own way."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}" + finished + "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}" + _ASKED.replace("%s", opening)
    )


DROPS = "{{ m.content.split('</think>')[-1] }}"  # DeepSeek-R1's distillations
KEEPS = "{{ m.content }}"
OPENS = "<think>\n{{ m.content }}"
REWRITES = (  # Qwen3's thinking models
    "{% set parts = m.content.split('</think>') %}<think>\n"
    "{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1].strip() }}{% endif %}"
    "\n</think>\n\n{{ parts[-1].lstrip() }}"
)


@pytest.mark.parametrize("finished", [DROPS, KEEPS, OPENS, REWRITES])
@pytest.mark.parametrize("opening", ["<think>\n", "<think>"])
@pytest.mark.parametrize(
    ("target", "thought"),
    [
        ("<think>\n1 and 1\n</think>\n\n2", "1 and 1"),
        ("<think>1 and 1</think>2", "1 and 1"),
        ("\n<think> 1 and 1 </think> 2", "1 and 1"),
        ("1 and 1</think>2", "1 and 1"),
        ("<think></think>2", ""),
        ("2", ""),
    ],
)
def test_a_thought_is_opened_and_closed_once(opening, finished, target, thought):
    tokenizer = tiny_tokenizer(thinking(opening, finished))
    renderer = ChatRenderer(tokenizer)
    token_ids, num_prompt_tokens = renderer.supervised(USER, target)
    assert token_ids[:num_prompt_tokens] == renderer.prompt(USER)
    text = text_of(tokenizer, token_ids).rpartition("assistant\n")[2]
    assert text.count("<think>") == text.count("</think>") == 1
    before, _, after = text.partition("</think>")
    assert before.removeprefix("<think>").strip() == thought
    assert after.strip() == "2<|im_end|>"


@pytest.mark.parametrize("tag", ["[THINK]", "<thought>", "<seed:think>", "◁think▷"])
def test_thoughts_in_other_tags(tag):
    tokenizer = tiny_tokenizer(thinking(tag, KEEPS))
    tokenizer.add_tokens(["◁", "▷"])
    renderer = ChatRenderer(tokenizer)
    closing = f"{tag[0]}/{tag[1:]}"
    for target in (f"{tag}1{closing}2", "2"):
        text = text_of(tokenizer, renderer.supervised(USER, target)[0])
        assert text.count(tag) == text.count(closing) == 1
    assert not renderer.opens_thought(renderer.prompt(USER))


def test_thought_that_the_template_leaves_out_is_kept():
    """The first of DeepSeek-R1's templates, which opens nothing."""
    tokenizer = tiny_tokenizer(thinking("", DROPS))
    target = "<think>1 and 1</think>2"
    token_ids, num_prompt_tokens = ChatRenderer(tokenizer).supervised(USER, target)
    assert text_of(tokenizer, token_ids[num_prompt_tokens:]) == target + "<|im_end|>"


def test_target_after_a_closed_thought():
    tokenizer = tiny_tokenizer()
    renderer = ChatRenderer(tokenizer, enable_thinking=False)
    for target in ("2", "<think>\n\n</think>\n\n2"):
        text = text_of(tokenizer, renderer.supervised(USER, target)[0])
        assert text.endswith("assistant\n<think>\n\n</think>\n\n2<|im_end|>")
    with pytest.raises(ValueError, match="closes an empty thought .*enable_thinking"):
        renderer.supervised(USER, "<think>1 and 1</think>2")


@pytest.mark.parametrize(
    ("template", "question", "opened"),
    [
        (thinking("<think>\n", KEEPS), "1+1?", True),
        (thinking("<think>", KEEPS), "1+1?", True),
        (CHATML, "1+1?", False),
        (CHATML, "Think in <think>", False),
        (None, "1+1? <think>", True),
        (None, "1+1? <think></think>", False),
    ],
)
def test_prompts_that_open_the_thought(template, question, opened):
    renderer = ChatRenderer(tiny_tokenizer(template))
    assert renderer.opens_thought(renderer.prompt(user(question))) == opened


def test_prompt_stays_a_prefix_where_tokens_merge_across_the_border():
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def merging(text, add_special_tokens):
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        pair = tokenizer("?2", add_special_tokens=False)["input_ids"]
        for start in range(len(ids) - 1):
            if ids[start : start + 2] == pair:
                ids = [*ids[:start], 1000, *ids[start + 2 :]]
        return {"input_ids": ids}

    class Merging:
        __call__ = staticmethod(merging)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    renderer = ChatRenderer(Merging())
    token_ids, num_prompt_tokens = renderer.supervised(USER, "2")
    assert 1000 in merging("1+1?2", False)["input_ids"]
    assert token_ids[:num_prompt_tokens] == renderer.prompt(USER)
    assert text_of(tokenizer, token_ids) == "1+1?2<|im_end|>"


def test_refusing_chat_template_is_named():
    tokenizer = tiny_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="refuses a conversation of system, user: System role"):
        ChatRenderer(tokenizer).prompt([{"role": "system", "content": "s"}, *USER])


def test_supervised_row_without_any_end_is_refused():
    with pytest.raises(ValueError, match="no EOS token"):
        ChatRenderer(tiny_tokenizer(None, end=None)).supervised(USER, "2")


# -- images


def user(text):
    return [{"role": "user", "content": text}]


def part(text):
    return {"type": "text", "text": text}


PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("What?", 1, [PICTURE, part("What?")]),
        ("What?", 2, [PICTURE, PICTURE, part("What?")]),
        ("<image>What?", 1, [PICTURE, part("What?")]),
        ("<image>\nWhat?", 1, [PICTURE, part("What?")]),
        ("<image>\n<image>\nWhat?\n", 2, [PICTURE, PICTURE, part("What?")]),
        ("What?\n<image>", 1, [part("What?"), PICTURE]),
        ("Is <image> a\nor <image>", 2, [part("Is "), PICTURE, part(" a\nor "), PICTURE]),
        ("<image>", 1, [PICTURE]),
    ],
)  # fmt: skip
def test_images_are_placed(text, count, expected):
    assert place_images(user(text), count) == [{"role": "user", "content": expected}]


def test_markers_are_counted_in_the_users_turns():
    turns = [
        {"role": "system", "content": "<image>"},
        {"role": "user", "content": "<image> <image>"},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": "<image>"},
    ]
    assert count_markers(turns) == 3
    placed = place_images(turns, 3)
    assert [type(turn["content"]) for turn in placed] == [str, list, str, list]
    assert place_images(turns, 0) == turns


@pytest.mark.parametrize("with_template", [True, False], ids=["chat", "plain"])
def test_image_tokens_are_repeated(with_template):
    tokenizer = vision_tokenizer() if with_template else vision_tokenizer(None)
    renderer = ChatRenderer(tokenizer, vision=vision_tokens(tokenizer))
    messages = place_images(user("<image>or<image>"), 2)
    token_ids = renderer.prompt(messages, [3, 1])
    assert f"{START}{IMAGE * 3}{END}or{START}{IMAGE}{END}" in text_of(tokenizer, token_ids)
    whole, num_prompt_tokens = renderer.supervised(messages, "2", [3, 1])
    assert whole[:num_prompt_tokens] == token_ids
    assert text_of(tokenizer, whole[num_prompt_tokens:]) == "2<|im_end|>"


def test_number_of_image_tokens_is_checked():
    tokenizer = vision_tokenizer()
    renderer = ChatRenderer(tokenizer, vision=vision_tokens(tokenizer))
    with pytest.raises(ValueError, match="1 images became 2 image tokens"):
        renderer.prompt(place_images(user(f"spelt out {IMAGE}"), 1), [3])
    with pytest.raises(ValueError, match="0 images became 1 image tokens"):
        renderer.prompt(user(IMAGE))


def test_tokens_of_images_in_a_text_are_found():
    tokenizer = vision_tokenizer()
    renderer = ChatRenderer(tokenizer, vision=vision_tokens(tokenizer))
    for token in (START, END, IMAGE, VIDEO):
        assert renderer.vision_token_in(f"a {token} b") == token
    assert renderer.vision_token_in("<image> vision_start") is None
    assert ChatRenderer(tokenizer).vision_token_in(IMAGE) is None
    tokenizer.image_token = IMAGE  # of a text model whose tokenizer it shares with larger ones
    assert ChatRenderer(tokenizer).vision_token_in(f"a {IMAGE} b") == IMAGE

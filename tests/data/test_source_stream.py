"""Rows with images, from files of every kind to prompts."""

from __future__ import annotations

import base64
import json
import logging
import pickle  # noqa: TID251 (as entries go to the reward workers)

import pytest
from PIL import Image

from recap_fast.config import DataConfig, SourceConfig
from recap_fast.data.mix import DataError, DataStream
from recap_fast.rewards.functions import accuracy, thinking_format
from recap_fast.types import RewardSample
from tests.vision_rows import (
    END,
    IMAGE,
    START,
    encoded,
    encoder,
    picture,
    vision_tokenizer,
    vision_tokens,
)

TOKENIZER = vision_tokenizer()
IMAGE_ID = vision_tokens(TOKENIZER).image


def source(path, kind="rl", **keys):
    keys = {"held_out": 0, "images": "image", **keys}
    if kind == "rl":
        keys.setdefault("rewards", {"accuracy": "accuracy"})
    return SourceConfig(name="s", kind=kind, path=str(path), **keys)


def stream(*sources, images=None, **keys):
    config = DataConfig(sources=list(sources), **{"max_skipped_fraction": 1.0, **keys})
    return DataStream(config, TOKENIZER, 0, images or encoder())


def write_rows(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(folder, rows, features=None):
    import datasets

    path = folder / "rows.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        picture(56, 28, seed=number).save(tmp_path / f"{number}.png")
    return tmp_path


def rows(count, **keys):
    return [
        {"question": f"q{i}", "answer": str(i), "image": f"{i}.png", **keys} for i in range(count)
    ]


def prompts(path, batch_size=1, **keys):
    return stream(source(path, **keys), batch_size=batch_size).next_step().prompts


# -- prompts


def test_image_stands_in_front_of_the_question(folder):
    prompt = prompts(write_rows(folder, rows(1)), prompt="{question}!")[0]
    assert prompt.text == "q0!"
    assert TOKENIZER.decode(prompt.token_ids) == (
        f"<|im_start|>user\n{START}{IMAGE * 2}{END}q0!<|im_end|>\n<|im_start|>assistant\n"
    )
    (image,) = prompt.images
    assert image.grid == (1, 2, 4)
    assert image.image.size == (56, 28)


def test_markers_say_where_images_stand(folder):
    row = {
        "question": "<image>\nIs this or <image>this a digit?",
        "answer": "1",
        "image": ["0.png", "1.png"],
    }
    prompt = prompts(write_rows(folder, [row]))[0]
    image = START + IMAGE * 2 + END
    expected = f"user\n{image}Is this or {image}this a digit?<|im_end|>"
    assert expected in TOKENIZER.decode(prompt.token_ids)
    assert prompt.text == row["question"]
    assert len(prompt.images) == 2


def test_images_of_a_conversation_belong_to_its_first_question(folder):
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "An <image>."},
        {"role": "user", "content": "Sure?"},
    ]
    row = {"question": turns, "answer": "yes", "image": "0.png"}
    text = TOKENIZER.decode(prompts(write_rows(folder, [row]))[0].token_ids)
    assert f"user\n{START}{IMAGE}{IMAGE}{END}What is it?<" in text
    assert "An <image>.<" in text
    assert text.count(START) == 1


def test_supervised_row(folder):
    path = write_rows(folder, rows(1))
    data = stream(source(path, "sft", target="<answer>{answer}</answer>"))
    row = data.next_step().supervised[0]
    target = TOKENIZER.decode(row.token_ids[row.num_prompt_tokens :])
    assert target == "<answer>0</answer><|im_end|>"
    assert row.token_ids[: row.num_prompt_tokens].count(IMAGE_ID) == 2
    assert len(row.images) == 1


def test_rows_without_images_stand_beside_those_with(folder):
    mixed = rows(3)
    mixed[1]["image"] = None
    mixed[2]["image"] = []
    got = sorted(prompts(write_rows(folder, mixed), batch_size=3), key=lambda prompt: prompt.row)
    assert [len(prompt.images) for prompt in got] == [1, 0, 0]
    assert got[1].token_ids.count(IMAGE_ID) == 0
    assert TOKENIZER.decode(got[1].token_ids).startswith("<|im_start|>user\nq1<")


def test_tokenizer_without_a_chat_template(folder):
    config = DataConfig(sources=[source(write_rows(folder, rows(1)))])
    plain = vision_tokenizer(None)
    prompt = DataStream(config, plain, 0, encoder()).next_step().prompts[0]
    assert plain.decode(prompt.token_ids) == f"{START}{IMAGE * 2}{END}q0\n"


def test_chat_template_that_knows_no_images(folder):
    config = DataConfig(sources=[source(write_rows(folder, rows(1)))])
    deaf = vision_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 1 images became 0 image tokens: .*chat"):
        DataStream(config, deaf, 0, encoder()).next_step()


def test_long_side_and_budget(folder):
    picture(560, 280).save(folder / "0.png")
    path = write_rows(folder, rows(1))
    limited = prompts(path, max_image_side=112)[0]
    assert limited.images[0].image.size == (112, 56)
    assert limited.token_ids.count(IMAGE_ID) == 8


# -- forms of images


@pytest.mark.parametrize("form", ["image", "images", "bytes", "path", "null"])
def test_parquet(folder, form):
    """Image features (decoded by `datasets` only when asked to), bytes and paths."""
    import datasets

    picked = [encoded(picture(56, 28, seed=i)) for i in range(3)]
    stored = [{"bytes": content, "path": None} for content in picked]
    cells = {
        "image": stored,
        "images": [[cell, cell] for cell in stored],
        "bytes": picked,
        "path": ["0.png", "1.png", "2.png"],
        "null": [None, None, None],
    }[form]
    feature = {
        "image": datasets.Image(),
        "images": datasets.List(datasets.Image()),
        "bytes": datasets.Value("binary"),
        "path": datasets.Value("string"),
        "null": datasets.Image(),
    }[form]
    text = datasets.Value("string")
    table = [{"question": f"q{i}", "answer": str(i), "image": cells[i]} for i in range(3)]
    features = datasets.Features(question=text, answer=text, image=feature)
    got = prompts(write_table(folder, table, features), batch_size=3)
    wanted = {"images": 2, "null": 0}.get(form, 1)
    assert [len(prompt.images) for prompt in got] == [wanted] * 3
    for prompt in got if wanted else []:
        assert prompt.images[0].image.tobytes() == picture(56, 28, seed=prompt.row).tobytes()


def test_other_media_columns_are_not_read(folder):
    """They would be decoded with every row, and sent to the reward workers."""
    import datasets

    table = [
        {"question": "q", "answer": "1", "image": {"bytes": encoded(picture(56, 28)), "path": None},
         "preview": {"bytes": b"broken", "path": None}, "more": [{"bytes": b"x", "path": None}]}
    ]  # fmt: skip
    text = datasets.Value("string")
    features = datasets.Features(
        question=text, answer=text, image=datasets.Image(), preview=datasets.Image(),
        more=datasets.List(datasets.Image()),
    )  # fmt: skip
    path = write_table(folder, table, features)
    assert set(prompts(path)[0].entry) == {
        "question", "answer", "original_image_sizes", "model_image_sizes",
    }  # fmt: skip
    assert set(prompts(path, images=None)[0].entry) == {"question", "answer"}


def test_folder_of_images(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    path = write_rows(other, rows(1))
    assert len(prompts(path, image_folder=str(folder))) == 1
    with pytest.raises(
        DataError, match=r"no row to train on .*image_missing.*image 1 \(0\.png\): no such"
    ):
        prompts(path)


def test_what_reward_workers_get_holds_sizes_and_no_images(folder):
    picture(100, 60).save(folder / "0.png")
    prompt = prompts(write_rows(folder, rows(1, other=[1])), max_image_side=70)[0]
    assert prompt.entry == {
        "question": "q0",
        "answer": "0",
        "other": [1],
        "original_image_sizes": [[100, 60]],
        "model_image_sizes": [[56, 56]],
    }
    assert len(pickle.dumps(prompt.entry)) < 300


# -- the same question about other images


def test_the_same_question_about_another_image_is_another_question(folder):
    same = [{"question": "What number?", "answer": str(i), "image": f"{i}.png"} for i in range(8)]
    data = stream(source(write_rows(folder, same), held_out=3), batch_size=5)
    held_out = {prompt.row for prompt in data.held_out("s")}
    assert len(held_out) == 3
    drawn = {prompt.row for _ in range(4) for prompt in data.next_step().prompts}
    assert drawn == set(range(8)) - held_out


def test_the_same_question_about_the_same_image_is_held_out(folder):
    copies = [
        {"question": "What number?", "answer": "1", "image": f"{name}.png"} for name in "0011233"
    ]
    data = stream(source(write_rows(folder, copies), held_out=2), batch_size=4)
    names = "0011233"
    held_out = {names[prompt.row] for prompt in data.held_out("s")}
    assert len(held_out) == 2
    drawn = {names[prompt.row] for _ in range(5) for prompt in data.next_step().prompts}
    assert drawn == set("0123") - held_out


def test_held_out_rows_are_prepared_anew_and_counted_once(folder):
    frames = [picture(28, 28, seed=number) for number in range(2)]
    for name in "ab":
        frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:])
    table = [{"question": name, "answer": "1", "image": f"{name}.gif"} for name in "ab"]
    data = stream(source(write_rows(folder, table), held_out=1))
    first, second = data.held_out("s")[0], data.held_out("s")[0]
    assert first.token_ids == second.token_ids
    assert first.images[0] is not second.images[0]
    assert data.noted == {"s/animated_image": 1}
    (folder / f"{first.text}.gif").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl:\d: a held-out row cannot be read any more"):
        data.held_out("s")


# -- rows that are skipped


def broken_rows(folder):
    """A usable row, and one of every kind that is not."""
    picture(400, 1).save(folder / "long.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    content = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    kinds = {
        "image_missing": ["gone.png", [None], ""],
        "image_unreadable": ["text.png", "half.png", "."],
        "image_empty": ["empty.png"],
        "image_url": ["https://example.com/1.png"],
        "image_too_elongated": ["long.png"],
    }
    bad = [
        {"question": f"bad {reason} {i}", "answer": "1", "image": cell}
        for reason, cells in kinds.items()
        for i, cell in enumerate(cells)
    ]
    bad += [
        {"question": "<image> and <image>", "answer": "1", "image": "0.png"},
        {"question": "<image>", "answer": "1", "image": ["0.png", "1.png"]},
        {"question": "<image> of nothing", "answer": "1", "image": None},
        {"question": f"What is {IMAGE}?", "answer": "1", "image": "0.png"},
        {"question": f"{START} {END}", "answer": "1", "image": None},
    ]
    counts = {reason: len(cells) for reason, cells in kinds.items()}
    return rows(1) + bad, counts | {"image_placeholders": 3, "image_token_in_text": 2}


def test_bad_rows_are_skipped_counted_and_named_once(folder, caplog):
    table, counts = broken_rows(folder)
    data = stream(source(write_rows(folder, table)), batch_size=1)
    with caplog.at_level(logging.WARNING):
        drawn = [data.next_step().prompts[0].row for _ in range(3)]
    assert drawn == [0, 0, 0]
    assert {key.removeprefix("s/") for key in data.skipped} == set(counts)
    epochs = 3
    assert all(0 < data.skipped[f"s/{name}"] <= epochs * counts[name] for name in counts)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(counts)
    for reason in counts:
        (message,) = [text for text in messages if text.endswith(f"({reason})")]
        assert "rows.jsonl:" in message
        assert "skipped" in message


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([5, 5, 2, 2], "must be a box"),
        ("[1, 2, 3]", "must be a box"),
        (None, "must be a box"),
        ([0.1, 0.2, 0.5, 0.6], "smaller than a pixel"),
        ([100, 100, 900, 900], "not inside its image"),
        ([1, 2, 3, 10**401], "too large"),
    ],
)
def test_rows_with_a_useless_box_are_skipped(folder, caplog, box, reason):
    good = {"question": "q", "answer": [1, 1, 9, 9], "image": "0.png"}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good | {"answer": box})))
    data = stream(source(path, rewards={"iou": "iou"}), batch_size=1)
    with caplog.at_level(logging.WARNING):
        assert [data.next_step().prompts[0].row for _ in range(4)] == [0] * 4
    assert data.skipped["s/bad_answer"] >= 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert "rows.jsonl:2" in message
    assert reason in message


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"question": None}, "wanted a text"),
        ({"question": "  "}, "wanted a text"),
        ({"turns": [{"value": "q"}]}, "'turns.1.value' leads nowhere"),
        ({"turns": [{"value": "q"}, {"value": None}]}, "wanted a text or a number, got NoneType"),
        ({"images": []}, "'images.0' leads nowhere"),
        ({"choices": [str(n) for n in range(27)]}, "up to 26 options"),
    ],
)
def test_bad_cells_of_a_table_are_skipped_and_counted(tmp_path, caplog, bad, problem):
    good = {
        "question": "q", "turns": [{"value": "q"}, {"value": "a"}], "images": ["x.png"],
        "choices": ["yes", "no"],
    }  # fmt: skip
    picture(28, 28).save(tmp_path / "x.png")
    rows = [good | {"question": f"q{n}"} for n in range(6)]
    rows[3] |= bad
    path = write_table(tmp_path, rows)
    keys = {"images": "images.0", "answer": "turns.1.value", "choices": "choices"}
    data = stream(source(path, "sft", **keys), batch_size=1)
    assert sorted(data.next_step().supervised[0].row for _ in range(5)) == [0, 1, 2, 4, 5]
    data.next_step()  # of the second epoch: all of the first has been seen
    assert data.skipped["s/bad_cell"] >= 1
    assert set(data.skipped) == {"s/bad_cell"}
    assert "rows.parquet: row 3" in caplog.text
    assert problem in caplog.text


def test_a_wrong_mapping_of_a_table_is_refused(tmp_path):
    path = write_table(tmp_path, [{"question": "q", "turns": ["q"]} for _ in range(30)])
    with pytest.raises(DataError, match=r"row 0: 'turns\.1' leads nowhere"):
        stream(source(path, "sft", images=None, answer="turns.1"))


def test_text_that_no_tokenizer_takes_is_skipped(tmp_path):
    rows = [{"question": "q\ud800", "answer": "a"}, {"question": "r", "answer": "a"}]
    data = stream(source(write_rows(tmp_path, rows), "sft", images=None), batch_size=1)
    assert [data.next_step().supervised[0].row for _ in range(3)] == [1, 1, 1]
    assert set(data.skipped) == {"s/cannot_be_rendered"}


@pytest.mark.parametrize("cell", ["9" * 5000, "[" * 100_000])
def test_json_that_cannot_be_read_names_its_line(tmp_path, cell):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": ' + cell + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        stream(source(path, "sft", images=None))


def test_skipped_counts_survive_a_resumption(folder):
    table, _ = broken_rows(folder)
    path = write_rows(folder, table)
    data = stream(source(path))
    data.next_step()
    state = json.loads(json.dumps(data.state_dict()))
    resumed = stream(source(path))
    resumed.load_state_dict(state)
    assert resumed.skipped == data.skipped
    assert resumed.next_step().prompts[0].token_ids == data.next_step().prompts[0].token_ids


def test_too_many_bad_images_stop_the_run_and_say_why(folder):
    missing = [
        {"question": f"q{i}", "answer": "1", "image": f"{i % 24}.png"} for i in range(96)
    ]  # half of them
    data = stream(source(write_rows(folder, missing)), batch_size=40, max_skipped_fraction=0.2)
    with pytest.raises(DataError, match=r"image_missing.*; the first image_missing: .*rows\.jsonl"):
        data.next_step()


def test_target_that_spells_out_a_token_of_images(folder):
    table = [*rows(1), {"question": "q", "answer": f"{IMAGE}", "image": "1.png"}]
    data = stream(source(write_rows(folder, table), "sft"), batch_size=4)
    assert {row.row for row in data.next_step().supervised} == {0}
    assert data.skipped["s/image_token_in_text"] >= 1


def test_tokens_of_images_in_the_text_of_a_source_without_images(folder):
    table = [{"question": "q", "answer": "1"}, {"question": f"{IMAGE}", "answer": "1"}]
    data = stream(source(write_rows(folder, table), images=None), batch_size=3)
    assert {prompt.row for prompt in data.next_step().prompts} == {0}


def test_prompts_too_long_because_of_their_images(folder):
    picture(224, 224).save(folder / "1.png")
    data = stream(source(write_rows(folder, rows(2))), batch_size=2, max_prompt_tokens=60)
    assert {prompt.row for prompt in data.next_step().prompts} == {0}
    assert data.skipped["s/prompt_too_long"] >= 1


def test_animations_are_used_and_noted(folder, caplog):
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "0.gif", save_all=True, append_images=frames[1:])
    path = write_rows(folder, [{"question": "q", "answer": "1", "image": "0.gif"}])
    data = stream(source(path), batch_size=2)
    assert data.next_step().prompts[0].images[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert data.noted == {"s/animated_image": 2}
    assert data.skipped == {}
    assert caplog.text.count("the first frame is used") == 1


def test_images_without_an_encoder(folder):
    config = DataConfig(sources=[source(write_rows(folder, rows(1)))])
    with pytest.raises(DataError, match="'s': has `images`, but the model takes none"):
        DataStream(config, TOKENIZER, 0)


def test_column_of_images_must_be_there(folder):
    with pytest.raises(DataError, match=r"no column 'picture' \(`images` of the source\)"):
        prompts(write_rows(folder, rows(1)), images="picture")


# -- conversations with parts


def test_images_in_the_parts_of_a_conversation(folder):
    uri = "data:image/png;base64," + base64.b64encode((folder / "1.png").read_bytes()).decode()
    for held, number in [
        ({"type": "image", "image": "0.png"}, 0),
        ({"type": "image_url", "image_url": {"url": uri}}, 1),
        ({"type": "image", "image": (folder / "2.png").as_uri()}, 2),
    ]:
        content = [held, {"type": "text", "text": "What?"}]
        row = {"messages": [{"role": "user", "content": content}], "answer": "1"}
        keys = {"question": "messages", "images": "messages", "prompt": "{question}!"}
        prompt = prompts(write_rows(folder, [row]), **keys)[0]
        assert f"user\n{START}{IMAGE * 2}{END}What?!<" in TOKENIZER.decode(prompt.token_ids)
        assert prompt.images[0].image.tobytes() == picture(56, 28, seed=number).tobytes()
        assert prompt.entry["messages"] == [{"role": "user", "content": "<image>What?"}]
        assert prompt.entry["original_image_sizes"] == [[56, 28]]


def test_parts_without_images_beside_a_column(folder):
    """TRL's shape of vision rows, as Parquet stores it: every part with every key."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}], "answer": "1", "image": ["0.png"]}
    prompt = prompts(write_table(folder, [row]), question="messages")[0]
    assert f"user\n{START}{IMAGE * 2}{END}What?<" in TOKENIZER.decode(prompt.token_ids)


def test_target_in_a_conversation_with_parts(folder):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A digit."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]
    path = write_rows(folder, [{"messages": turns, "image": "0.png"}])
    row = stream(source(path, "sft", question="messages")).next_step().supervised[0]
    assert TOKENIZER.decode(row.token_ids[row.num_prompt_tokens :]) == "4<|im_end|>"
    assert "A digit.<|im_end|>" in TOKENIZER.decode(row.token_ids[: row.num_prompt_tokens])


# -- the same question in other shapes


def shapes(text):
    parts = [{"type": "text", "text": text}]
    return {
        "text": text,
        "spaces": f" {text.replace(' ', '  ')}\n",
        "turn": [{"role": "user", "content": text}],
        "parts": [{"role": "user", "content": parts}],
        "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
    }


@pytest.mark.parametrize("first", ["text", "turn", "system"])
def test_held_out_questions_of_other_shapes_are_passed_over(tmp_path, first):
    sources = []
    for shape in shapes(""):
        (tmp_path / shape).mkdir()
        made = [
            {"question": shapes(f"What is {i} plus 1?")[shape], "answer": "1"} for i in range(8)
        ]
        path = write_rows(tmp_path / shape, made)
        keys = {"held_out": 4 if shape == first else 0, "images": None}
        sources.append(source(path, **keys).model_copy(update={"name": shape}))
    data = stream(*sources, batch_size=10)
    held_out = {prompt.row for prompt in data.held_out(first)}
    drawn = {(p.source, p.row) for _ in range(6) for p in data.next_step().prompts}
    assert drawn == {(shape, row) for shape in shapes("") for row in set(range(8)) - held_out}


# -- prompts that open the thought


@pytest.mark.parametrize("parameter", [None, True, False])
def test_prompts_that_open_the_thought_say_so(tmp_path, caplog, parameter):
    path = write_rows(tmp_path, [{"question": "q <think>", "answer": "1"}] * 3)
    spec = {"function": "thinking_format", "parameters": {}}
    if parameter is not None:
        spec["parameters"] = {"prompt_opens_think": parameter}
    plain = vision_tokenizer(None)
    config = DataConfig(sources=[source(path, images=None, rewards={"thoughts": spec})])
    with caplog.at_level(logging.WARNING):
        prompt = DataStream(config, plain, 0).next_step().prompts[0]
    assert prompt.entry["prompt_opens_think"] is True
    assert ("but its prompts end with <think>" in caplog.text) == (parameter is False)
    sample = RewardSample("1</think><answer>1</answer>", "1", prompt.entry, 5, 9, "stop")
    assert thinking_format(sample, **spec["parameters"]) == float(parameter is not False)


def test_prompts_that_do_not_open_the_thought(tmp_path, caplog):
    path = write_rows(tmp_path, [{"question": "q", "answer": "1"}] * 3)
    spec = {"function": "thinking_format", "parameters": {"prompt_opens_think": True}}
    with caplog.at_level(logging.WARNING):
        prompt = prompts(path, images=None, rewards={"thoughts": spec})[0]
    assert "prompt_opens_think" not in prompt.entry
    assert "prompt_opens_think: true, but its prompts do not end with <think>" in caplog.text


# -- answers and options as they are


def test_lists_of_answers_and_labelled_options_reach_rewards(tmp_path):
    rows = [
        {"question": "q", "answer": ["4", "four"], "options": {"A": "4", "B": "5"}},
        {"question": "r", "answer": "C", "options": {"A": "x", "C": "y"}},
    ]
    path = write_table(tmp_path, rows[:1] + [rows[1] | {"answer": ["C"]}])
    rewards = {"mine": "tests.tiny_rewards:constant"}
    got = prompts(path, batch_size=2, images=None, choices="options", rewards=rewards)
    got = sorted(got, key=lambda prompt: prompt.row)
    assert got[0].answer == ["4", "four"]
    assert got[1].entry["options"] == {"A": "x", "C": "y"}  # Parquet's has B: None
    assert got[1].text == "r\n(A) x\n(C) y"


def test_options_inside_of_a_column_reach_rewards(tmp_path):
    rows = [
        {"question": {"stem": "q", "choices": [{"label": "B", "text": "x"},
                                               {"label": "A", "text": "y"}]}, "answer": "x"},
        {"question": {"stem": "r", "choices": []}, "answer": "4"},
    ]  # fmt: skip
    keys = {"question": "question.stem", "choices": "question.choices"}
    rewards = {"accuracy": "accuracy"}
    path = write_rows(tmp_path, rows)
    got = prompts(path, batch_size=2, images=None, rewards=rewards, **keys)
    got = sorted(got, key=lambda prompt: prompt.row)
    assert [prompt.text for prompt in got] == ["q\n(B) x\n(A) y", "r"]
    for prompt, right, wrong in zip(got, ["B", "4"], ["A", "5"], strict=True):
        for answer, reward in ((right, 1.0), (wrong, 0.0)):
            sample = RewardSample(answer, prompt.answer, prompt.entry, 5, 9, "stop")
            assert accuracy(sample, choices="question.choices") == reward

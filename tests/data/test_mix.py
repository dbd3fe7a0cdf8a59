from __future__ import annotations

import json
from collections import Counter

import pytest

from recap_fast.config import DataConfig, SourceConfig
from recap_fast.data.mix import DataError, DataStream
from recap_fast.types import Prompt, StepFeedback, SupervisedRow
from tests.tiny_tokenizer import tiny_tokenizer


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count, prefix="question"):
    return [{"question": f"{prefix} {i}", "answer": str(i), "extra": i} for i in range(count)]


def rl(name, path=None, **keys):
    keys = {"held_out": 2, "rewards": {"accuracy": "accuracy"}, **keys}
    return SourceConfig(name=name, kind="rl", path=path, **keys)


def sft(name, path=None, **keys):
    return SourceConfig(name=name, kind="sft", path=path, **{"held_out": 2, **keys})


def stream(*sources, seed=0, **keys):
    return DataStream(DataConfig(sources=list(sources), **keys), tiny_tokenizer(), seed)


def one_source(tmp_path, rows, make=rl, seed=0, data=None, **keys):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return stream(make("s", path, **keys), seed=seed, **(data or {}))


def drawn(data, steps):
    rows = []
    for _ in range(steps):
        step = data.next_step()
        rows += [(row.source, row.row) for row in [*step.prompts, *step.supervised]]
    return rows


# -- rows


def test_rl_row(tmp_path):
    data = one_source(
        tmp_path, questions(5), prompt="Solve: {question}", system="be brief", held_out=0
    )
    prompt = data.next_step().prompts[0]
    assert isinstance(prompt, Prompt)
    assert prompt.text == f"Solve: question {prompt.row}"
    assert prompt.answer == str(prompt.row)
    assert prompt.entry == questions(5)[prompt.row]
    assert tiny_tokenizer().decode(prompt.token_ids) == (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nSolve: question {prompt.row}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_sft_row(tmp_path):
    data = one_source(tmp_path, questions(5), sft, target="It is {answer}.", held_out=0)
    row = data.next_step().supervised[0]
    assert isinstance(row, SupervisedRow)
    target = row.token_ids[row.num_prompt_tokens :]
    assert tiny_tokenizer().decode(target) == f"It is {row.row}.<|im_end|>"


def test_conversations_as_questions(tmp_path):
    turns = [
        {"role": "system", "content": "own"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "second"},
    ]
    rows = [{"question": turns, "answer": "1"}] * 3
    data = one_source(tmp_path, rows, prompt="{question}!", system="ours", held_out=0)
    prompt = data.next_step().prompts[0]
    assert prompt.text == "second!"
    text = tiny_tokenizer().decode(prompt.token_ids)
    assert "own" in text
    assert "ours" not in text
    assert "first<|im_end|>" in text


def test_numbers_are_targets_too(tmp_path):
    rows = [{"question": f"q{i}", "answer": i / 2} for i in range(3)]
    row = one_source(tmp_path, rows, sft, held_out=0).next_step().supervised[0]
    target = tiny_tokenizer().decode(row.token_ids[row.num_prompt_tokens :])
    assert target == f"{row.row / 2}<|im_end|>"


def test_source_without_answers(tmp_path):
    rows = [{"question": f"q{i}"} for i in range(3)]
    assert one_source(tmp_path, rows, answer=None, held_out=0).next_step().prompts[0].answer is None


def test_jsonl_byte_order_mark_blank_lines_and_carriage_returns(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in questions(3)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    data = stream(rl("s", str(path), held_out=0), batch_size=3)
    assert sorted(prompt.text for prompt in data.next_step().prompts) == [
        "question 0",
        "question 1",
        "question 2",
    ]


def test_parquet(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(pa.Table.from_pylist(questions(6)), tmp_path / "rows.parquet")
    data = stream(rl("s", str(tmp_path / "rows.parquet"), held_out=1), batch_size=5)
    rows = data.next_step().prompts + data.held_out("s")
    assert sorted(row.entry["extra"] for row in rows) == [0, 1, 2, 3, 4, 5]


def test_hub_dataset_by_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        return datasets.Dataset.from_list(questions(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = stream(rl("s", "owner/name", subset="main", split="test", held_out=0), batch_size=4)
    assert asked == [("owner/name", "main", "test")]
    assert len(data.next_step().prompts) == 4


# -- reasoning-gym


def test_reasoning_gym_rl_and_sft():
    data = stream(
        rl("sums", reasoning_gym="chain_sum", parameters={"max_terms": 2, "max_digits": 2}),
        sft("gcd", reasoning_gym="gcd", target="<answer>{answer}</answer>"),
    )
    step = data.next_step()
    prompt, row = step.prompts[0], step.supervised[0]
    assert prompt.entry["metadata"]["source_dataset"] == "chain_sum"
    assert prompt.entry["metadata"]["num_terms"] == 2
    assert prompt.answer == prompt.entry["answer"]
    target = tiny_tokenizer().decode(row.token_ids[row.num_prompt_tokens :])
    assert target.startswith("<answer>")
    assert target.endswith("</answer><|im_end|>")


def test_reasoning_gym_depends_on_seed_and_name():
    def texts(name, seed):
        data = stream(rl(name, reasoning_gym="chain_sum"), seed=seed)
        return [prompt.text for prompt in data.next_step().prompts]

    assert texts("a", 0) == texts("a", 0)
    assert texts("a", 0) != texts("a", 1)
    assert texts("a", 0) != texts("b", 0)


# -- order


def test_order_is_determined_by_the_seed(tmp_path):
    rows = questions(50)
    first, again = (drawn(one_source(tmp_path, rows, seed=3), 10) for _ in range(2))
    assert first == again
    assert first != drawn(one_source(tmp_path, rows, seed=4), 10)


def test_every_epoch_is_a_new_permutation(tmp_path):
    data = one_source(tmp_path, questions(12), held_out=2, data={"batch_size": 10})
    epochs = [[row for _, row in drawn(data, 1)] for _ in range(3)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len(set(epochs[0])) == 10
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_cursor_resumes_through_json(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(11))

    def build():
        return stream(
            rl("a", path), sft("b", path), sft("c", path), mixing={"a": 2, "b": 1, "c": 0.4}
        )

    data = build()
    drawn(data, 7)
    cursor = json.loads(json.dumps(data.state_dict()))
    expected = drawn(data, 9)
    resumed = build()
    resumed.load_state_dict(cursor)
    assert drawn(resumed, 9) == expected


def test_refills_leave_the_mix_alone_and_belong_to_the_cursor(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(60))

    def build():
        return stream(rl("a", path), rl("b", path), sft("c", path), batch_size=6)

    data = build()
    plain = [Counter(source for source, _ in drawn(build(), n)) for n in range(1, 6)]
    seen = []
    for _ in range(5):
        step = data.next_step()
        dropped = ["a" for prompt in step.prompts if prompt.source == "a"]
        new = data.refill(dropped)
        assert [prompt.source for prompt in new] == dropped
        seen += [(row.source, row.row) for row in [*step.prompts, *step.supervised]]
        assert Counter(source for source, _ in seen) == plain[len(seen) // 6 - 1]
        seen_rows = {row for source, row in seen if source == "a"}
        assert seen_rows.isdisjoint(prompt.row for prompt in new), "the next rows, not the same"
    cursor = json.loads(json.dumps(data.state_dict()))
    resumed = build()
    resumed.load_state_dict(cursor)
    expected = data.refill(["a", "b", "b"])
    assert resumed.refill(["a", "b", "b"]) == expected
    assert drawn(resumed, 4) == drawn(data, 4)


@pytest.mark.parametrize("change", ["rows", "mixing", "adaptive", "review"])
def test_cursor_of_other_data_is_refused(tmp_path, change):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(11))
    cursor = stream(rl("a", path), sft("b", path)).state_dict()
    keys = {}
    if change == "rows":
        write_jsonl(tmp_path / "rows.jsonl", questions(12))
    elif change == "mixing":
        keys["mixing"] = {"a": 1.0, "b": 3.0}
    elif change == "adaptive":
        keys["mixing"] = "adaptive"
    elif change == "review":
        keys["review"] = {}
    other = stream(rl("a", path), sft("b", path), **keys)
    with pytest.raises(DataError, match="cursor"):
        other.load_state_dict(cursor)


# -- held-out rows


def test_held_out_rows_are_disjoint_and_fixed(tmp_path):
    rows = questions(20) + questions(20)  # every question twice
    data = one_source(tmp_path, rows, held_out=6)
    held_out = {prompt.text for prompt in data.held_out("s")}
    assert len(held_out) == 6
    seen = {p.text for _ in range(20) for p in data.next_step().prompts}
    assert seen.isdisjoint(held_out)
    assert len(seen) == 14
    assert data.skipped == {}
    assert [p.row for p in one_source(tmp_path, rows, held_out=6).held_out("s")] == [
        p.row for p in data.held_out("s")
    ]
    other = one_source(tmp_path, rows, held_out=6, seed=1).held_out("s")
    assert {p.text for p in other} != held_out


def test_held_out_questions_are_not_trained_on_through_another_source(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(20))
    data = stream(rl("a", path, held_out=5), sft("b", path, held_out=0))
    held_out = {prompt.row for prompt in data.held_out("a")}
    assert held_out.isdisjoint(row for source, row in drawn(data, 20) if source == "b")


@pytest.mark.parametrize(
    "disguise",
    [
        str.upper,
        lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in text),
        lambda text: [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "it is this"},
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "welcome"},
        ],
        lambda text: [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "this"},
            {"role": "user", "content": "and now?"},
        ],
    ],
)
def test_held_out_questions_in_disguise_are_not_trained_on(tmp_path, disguise):
    rows = questions(10)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    other = [{**row, "question": disguise(row["question"])} for row in rows]
    other_path = write_jsonl(tmp_path / "other.jsonl", other)
    data = stream(rl("a", path, held_out=5), sft("b", other_path, held_out=0))
    held_out = {prompt.row for prompt in data.held_out("a")}
    seen = {row for source, row in drawn(data, 10) if source == "b"}
    assert seen == set(range(10)) - held_out


def test_another_seed_cannot_go_on(tmp_path):
    state = one_source(tmp_path, questions(5), seed=3).state_dict()
    with pytest.raises(DataError, match="started with seed 3.*cannot go on with seed 4"):
        one_source(tmp_path, questions(5), seed=4).load_state_dict(state)


def test_held_out_of_an_sft_source(tmp_path):
    data = one_source(tmp_path, questions(10), sft, held_out=3)
    assert all(isinstance(row, SupervisedRow) for row in data.held_out("s"))
    assert len(data.held_out("s")) == 3


def test_held_out_of_an_unknown_source(tmp_path):
    with pytest.raises(DataError, match="no source 'ss'; did you mean 's'"):
        one_source(tmp_path, questions(10)).held_out("ss")


@pytest.mark.parametrize(("count", "held_out"), [(5, 5), (5, 64), (1, 1)])
def test_held_out_must_leave_rows(tmp_path, count, held_out):
    with pytest.raises(DataError, match=f"has {count} rows.*held_out: {held_out}.*lower held_out"):
        one_source(tmp_path, questions(count), held_out=held_out)


def test_source_whose_questions_are_all_held_out(tmp_path):
    rows = [{"question": "same", "answer": str(i)} for i in range(5)]
    data = one_source(tmp_path, rows, held_out=1)
    with pytest.raises(DataError, match="'s' has no row to train on among 5"):
        data.next_step()


# -- mixing


def test_stream_follows_explicit_ratios(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(30))
    data = stream(rl("a", path), sft("b", path), mixing={"a": 3.0, "b": 1.0}, batch_size=2)
    assert Counter(source for source, _ in drawn(data, 20)) == {"a": 30, "b": 10}


# -- what steps tell


def told(data, steps):
    """Rows of steps that give what depends on their rows and numbers alone."""
    seen = []
    for step in steps:
        rows = data.next_step()
        seen.append([(row.source, row.row) for row in [*rows.prompts, *rows.supervised]])
        groups = [(one.source, one.row, (one.row + step) % 5 > 0) for one in rows.prompts]
        weights = {"accuracy": 1 + step % 4 / 2, "ntp": 0.5}
        data.follow(StepFeedback(weights, groups))
    return seen


ADAPTIVE = {"mixing": "adaptive", "adaptive": {"shares": {"a": 2, "b": 1, "c": 1}, "most": 1.5}}


@pytest.mark.parametrize("keys", [ADAPTIVE, {"review": {"after": 3}}])
def test_streams_that_follow_steps_resume_through_json(tmp_path, keys):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(40))

    def build():
        return stream(rl("a", path), rl("b", path), sft("c", path), batch_size=6, **keys)

    data = build()
    told(data, range(13))
    cursor = json.loads(json.dumps(data.state_dict()))
    expected = told(data, range(13, 30))
    assert told(build(), range(30))[13:] == expected
    resumed = build()
    resumed.load_state_dict(cursor)
    assert told(resumed, range(13, 30)) == expected
    assert resumed.mix_metrics == pytest.approx(data.mix_metrics, nan_ok=True)
    assert resumed.state_dict() == data.state_dict()


def test_adaptive_shares_follow_the_weights_and_are_reported(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(40))
    data = stream(rl("a", path), sft("b", path), sft("c", path, objective="d"), batch_size=6,
                  **ADAPTIVE)  # fmt: skip
    assert data.mix_metrics == {"mixing/a": 0.5, "mixing/b": 0.25, "mixing/c": 0.25}
    for _ in range(60):
        data.follow(StepFeedback({"accuracy": 0.1, "ntp": 2.8, "d": 0.1}))
    assert data.mix_metrics == pytest.approx(  # b at its bound, and the others in proportion
        {"mixing/a": 0.625 * 2 / 3, "mixing/b": 0.375, "mixing/c": 0.625 / 3}
    )
    counts = Counter(source for source, _ in drawn(data, 40))
    assert counts == {"a": 100, "b": 90, "c": 50}


def test_solved_prompts_come_back_in_the_place_of_new_ones(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(400))
    sources = [rl("a", path), rl("b", path, rewards={"format": "thinking_format"})]
    plain = drawn(stream(*sources, batch_size=8), 3)
    data = stream(*sources, batch_size=8, review={"share": 0.5, "after": 3})
    steps = []
    for step in range(6):
        rows = data.next_step()
        steps.append([one.row for one in rows.prompts if one.source == "a"])
        assert len(rows.prompts) == 8
        data.follow(StepFeedback({}, [(one.source, one.row, step == 0) for one in rows.prompts]))
        if step == 4:
            assert data.mix_metrics["review/a"] == 2
            assert data.mix_metrics["review_solved/a"] == 0
    assert steps[0] + steps[1] + steps[2] == [row for source, row in plain if source == "a"]
    first = sorted(steps[0])
    assert steps[4][:2] == first[:2], "the step after three others"
    assert steps[5][:2] == first[:2], "lost, and so again"
    assert set(steps[3] + steps[4][2:] + steps[5][2:]).isdisjoint(steps[0])
    assert "review/b" not in data.mix_metrics


def test_a_reviewed_row_that_cannot_be_read_any_more_is_replaced(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", questions(40))
    data = stream(rl("a", path), batch_size=4, review={"share": 0.5, "after": 1})
    rows = data.next_step().prompts
    data.follow(StepFeedback({}, [(one.source, one.row, True) for one in rows]))
    data.next_step()
    monkeypatch.setattr(type(data._sources["a"]), "draw_again", lambda self, row: None)
    assert len(data.next_step().prompts) == 4
    assert len(json.dumps(data.state_dict()["review"])) > 0
    monkeypatch.undo()
    again = [one.row for _ in range(3) for one in data.next_step().prompts]
    assert len(set(again) & {one.row for one in rows}) == 2, "two of four were forgotten"


# -- rows that are skipped


def test_long_prompts_are_skipped_and_counted(tmp_path):
    rows = questions(18) + [{"question": "x" * 300, "answer": "1"}] * 2
    data = one_source(tmp_path, rows, held_out=0, data={"batch_size": 18, "max_prompt_tokens": 100})
    step = data.next_step()
    data.next_step()
    assert all(len(prompt.token_ids) <= 100 for prompt in step.prompts)
    assert data.skipped["s/prompt_too_long"] >= 2
    cursor = data.state_dict()
    data.next_step()
    data.load_state_dict(cursor)
    assert data.skipped["s/prompt_too_long"] == cursor["sources"]["s"]["skipped"]["prompt_too_long"]


def test_long_and_empty_supervised_rows_are_skipped_and_counted(tmp_path):
    rows = questions(16)
    rows += [{"question": "q", "answer": "x" * 300}, {"question": "r", "answer": " "}]
    data = one_source(
        tmp_path, rows, sft, held_out=0, data={"batch_size": 8, "max_supervised_tokens": 100}
    )
    drawn(data, 3)
    assert set(data.skipped) == {"s/empty_target", "s/row_too_long"}
    assert max(data.skipped.values()) <= 2  # 24 rows of 16 usable ones: not quite two epochs


def test_too_many_skipped_rows_stop_the_run(tmp_path):
    rows = questions(30) + [{"question": "x" * 300 + str(i), "answer": "1"} for i in range(30)]
    data = one_source(tmp_path, rows, held_out=0, data={"max_prompt_tokens": 100})
    with pytest.raises(DataError, match=r"'s' skipped \d+ of \d+ rows .*prompt_too_long.*0\.2"):
        drawn(data, 8)


def test_skipped_fraction_can_be_allowed(tmp_path):
    rows = questions(30) + [{"question": "x" * 300 + str(i), "answer": "1"} for i in range(30)]
    data = one_source(
        tmp_path, rows, held_out=0, data={"max_prompt_tokens": 100, "max_skipped_fraction": 0.9}
    )
    drawn(data, 8)
    assert data.skipped["s/prompt_too_long"] > 20


# -- sources that cannot be used


def jsonl_error(tmp_path, text, make=rl, **keys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        stream(make("src", str(path), **{"held_out": 0, **keys}))
    message = str(caught.value)
    assert "'src'" in message
    assert len(message.splitlines()) == 1
    return message


GOOD = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD * 5000 + '{"question": "q", \n' + GOOD, "bad.jsonl:5001: not valid JSON"),
        (GOOD + "\n[1]\n", "bad.jsonl:3: wanted a JSON object, got list"),
        (GOOD.encode() + b'{"question": "\xff"}\n', "bad.jsonl:2: not UTF-8"),
        (GOOD + '{"qestion": "q", "answer": "a"}\n', "bad.jsonl:2: no column 'question'"),
        (GOOD + '{"question": "q", "other": "a"}\n', "columns there: question, other"),
        (GOOD + '{"question": 5, "answer": "a"}\n', "bad.jsonl:2: column 'question': wanted"),
        (GOOD + '{"question": null, "answer": "a"}\n', "got NoneType None"),
        (GOOD + '{"question": [], "answer": "a"}\n', r"got list []"),
        (GOOD + '{"question": ["q"], "answer": "a"}\n', "got list ['q']"),
        (GOOD + '{"question": "  ", "answer": "a"}\n', "got str '  '"),
        (
            '{"question": [{"role": "assistant", "content": "x"}], "answer": "a"}\n',
            "last turn is the assistant's",
        ),
        ("", "the file is empty"),
        ("\n \n", "no rows, only blank lines"),
    ],
)
def test_bad_jsonl(tmp_path, text, expected):
    assert expected in jsonl_error(tmp_path, text)


def test_bad_targets(tmp_path):
    message = jsonl_error(tmp_path, GOOD + '{"question": "q", "answer": null}\n', sft)
    assert "bad.jsonl:2: column 'answer': wanted a text or a number, got NoneType" in message
    assert "got list" in jsonl_error(tmp_path, '{"question": "q", "answer": ["a"]}\n', sft)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.jsonl", "no such file"),
        ("missing.parquet", "no such file"),
        (
            "rows.csv",
            "ending in .jsonl, .json or .parquet, or a hub dataset's name (owner/name), got the "
            "ending '.csv'",
        ),
        ("rows.json", "no such file"),
        (".", "got a folder"),
    ],
)
def test_bad_path(tmp_path, name, expected):
    with pytest.raises(DataError) as caught:
        stream(rl("src", str(tmp_path / name)))
    assert expected in str(caught.value)


def test_path_that_is_neither_file_nor_hub_name():
    with pytest.raises(DataError, match="'a/b/c' is neither a file"):
        stream(rl("src", "a/b/c"))


def test_split_of_a_file(tmp_path):
    assert "subset and split are for hub datasets" in jsonl_error(tmp_path, GOOD, split="test")


def test_bad_parquet(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tables = {
        "cannot be read as Parquet": b"not parquet",
        "no column 'question'": pa.table({"text": ["q"], "answer": ["a"]}),
        "no rows": pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], "str")}),
        "row 0: column 'question': wanted a text": pa.table({"question": [1], "answer": ["a"]}),
    }
    for number, (expected, table) in enumerate(tables.items()):
        path = tmp_path / f"bad{number}.parquet"
        if isinstance(table, bytes):
            path.write_bytes(table)
        else:
            pq.write_table(table, path)
        with pytest.raises(DataError) as caught:
            stream(rl("src", str(path), held_out=0))
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)


def test_hub_dataset_that_cannot_be_loaded(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        stream(rl("src", "owner/name"))
    assert str(caught.value) == (
        "source 'src': hub dataset 'owner/name', split 'train' could not be loaded: "
        "ConnectionError: no network"
    )


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("chain_sums", {}, "no dataset 'chain_sums'; did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 3}, "no parameter 'max_term'; did you mean 'max_terms'"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "refuses the parameters"),
        ("chain_sum", {"size": 5}, "`size` is a key of the source"),
    ],
)
def test_bad_reasoning_gym_source(name, parameters, expected):
    with pytest.raises(DataError) as caught:
        stream(rl("src", reasoning_gym=name, parameters=parameters))
    assert expected in str(caught.value)
    assert "'src'" in str(caught.value)


def test_bad_templates(tmp_path):
    assert "did you mean 'answer'" in jsonl_error(tmp_path, GOOD, prompt="anwser")
    assert "target must have {answer}" in jsonl_error(tmp_path, GOOD, sft, target="fixed")


def test_refusing_chat_template_names_the_row(tmp_path):
    tokenizer = tiny_tokenizer("{{ raise_exception('System role not supported') }}")
    path = write_jsonl(tmp_path / "rows.jsonl", questions(3))
    config = DataConfig(sources=[rl("src", path, system="s")])
    with pytest.raises(DataError, match=r"'src' .*rows\.jsonl:\d: .*System role not supported"):
        DataStream(config, tokenizer, 0)

"""Sources that lack a column, sources of several subsets, and limits of rows."""

from __future__ import annotations

import json
import os

import pytest

from recap_fast.config import SourceConfig
from recap_fast.data.row_columns import DataError
from recap_fast.data.sources import image_folder, open_rows


def source(path="owner/name", kind="rl", **keys):
    rewards = {"accuracy": "accuracy"} if kind == "rl" else {}
    return SourceConfig(name="s", kind=kind, path=str(path), rewards=rewards, **keys)


def hub(monkeypatch, tables):
    import datasets

    def load_dataset(path, subset, split):
        return datasets.Dataset.from_list(tables[subset])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def table(count, prefix):
    return [{"question": f"{prefix}{i}", "answer": str(i)} for i in range(count)]


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    for keys, name in [
        ({"question": "conversations.0.value"}, "conversations.0.value"),
        ({"question": ["hint", "question"]}, "hint"),
        ({"choices": "options"}, "options"),
        ({"answer": "truth"}, "truth"),
    ]:
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: no column '{name}'"):
            open_rows(source(path, **keys), 0)


def test_several_subsets_make_one_source(monkeypatch):
    hub(monkeypatch, {"a": table(3, "a"), "b": table(2, "b"), "c": table(4, "c")})
    rows = open_rows(source(subset=["a", "b", "c"]), 0)
    assert len(rows) == 9
    expected = ["a0", "a1", "a2", "b0", "b1", "c0", "c1", "c2", "c3"]
    assert [rows[i]["question"] for i in range(9)] == expected
    assert rows.where(4) == "hub dataset 'owner/name', subset 'b', split 'train': row 1"


def test_limit_of_rows(monkeypatch):
    hub(monkeypatch, {"a": table(50, "a"), "b": table(2, "b"), None: table(50, "n")})
    rows = open_rows(source(subset=["a", "b"], max_rows=5), 3)
    assert len(rows) == 7
    chosen = [rows[i]["question"] for i in range(7)]
    assert len(set(chosen)) == 7
    assert chosen[5:] == ["b0", "b1"]
    assert chosen != [f"a{i}" for i in range(5)] + ["b0", "b1"]
    assert rows.where(0).endswith(f": row {chosen[0][1:]}")
    again = open_rows(source(subset=["a", "b"], max_rows=5), 3)
    assert [again[i]["question"] for i in range(7)] == chosen
    other = open_rows(source(max_rows=5), 4)
    assert [other[i]["question"][1:] for i in range(5)] != [name[1:] for name in chosen[:5]]


def test_limit_of_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table(9, "q")))
    assert len(open_rows(source(path, max_rows=4), 0)) == 4
    assert len(open_rows(source(path, max_rows=40), 0)) == 9


# -- files


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(rows):
    return [rows[i]["question"] for i in range(len(rows))]


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: json.dumps({"data": rows}),
        lambda rows: json.dumps({"version": 1, "data": rows, "splits": ["a"]}, indent=1),
        lambda rows: json.dumps({"rows": rows}),
        lambda rows: "\ufeff" + json.dumps(rows),
        lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
        lambda rows: "\r\n".join(json.dumps(row) for row in rows),
    ],
)
def test_json_documents(tmp_path, make):
    path = tmp_path / "rows.json"
    path.write_text(make(table(3, "q")), encoding="utf-8")
    rows = open_rows(source(path), 0)
    assert texts(rows) == ["q0", "q1", "q2"]
    assert "rows.json" in rows.where(1)


def test_json_of_a_single_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(table(1, "q")[0]) + "\n", encoding="utf-8")
    assert texts(open_rows(source(path), 0)) == ["q0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("[]", "no rows"),
        ('{"data": []}', "no rows"),
        ("3", "wanted a list of objects, .*got int"),
        ('{"a": [1], "b": [2]}', "an object with 2 lists and the keys a, b"),
        ('[{"question": "q", "answer": "1"}, 3]', "row 1: wanted a JSON object, got int"),
        ('[{"question": "q"}]', "row 0: no column 'answer'"),
        ('[{"question": "q",\n "answer": }]', "not valid JSON: .* at line 2, column 12"),
        ('{"question": "q", "answer": "1"}\n{"question"}', "rows.json:2: not valid JSON"),
    ],
)
def test_json_documents_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        open_rows(source(path), 0)


def test_patterns_and_lists_of_files(tmp_path):
    for name in ("b", "a", "deep/c"):
        write(tmp_path / f"{name}.jsonl", table(2, name[-1]))
    (tmp_path / "d.json").write_text(json.dumps(table(1, "d")))
    (tmp_path / "notes.txt").write_text("none")
    assert texts(open_rows(source(f"{tmp_path}/*.jsonl"), 0)) == ["a0", "a1", "b0", "b1"]
    assert texts(open_rows(source(f"{tmp_path}/*"), 0)) == ["a0", "a1", "b0", "b1", "d0"]
    everywhere = source(f"{tmp_path}/**/*.jsonl")
    assert texts(open_rows(everywhere, 0)) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    keys = {"name": "s", "kind": "rl", "rewards": {"accuracy": "accuracy"}}
    listed = SourceConfig(path=[f"{tmp_path}/b.jsonl", f"{tmp_path}/d*"], **keys)
    rows = open_rows(listed, 0)
    assert texts(rows) == ["b0", "b1", "d0"]
    assert rows.where(2).endswith("d.json: row 0")
    few = SourceConfig(path=f"{tmp_path}/*.jsonl", max_rows=3, **keys)
    assert len(open_rows(few, 0)) == 3
    bracket = write(tmp_path / "e[1].jsonl", table(1, "e"))
    assert texts(open_rows(source(bracket), 0)) == ["e0"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("*.jsonl", "fit this pattern, got none"),
        ("*.txt", "fit this pattern, got 1 files of other kinds"),
        (["owner/name"], "a list of paths holds files"),
        (["notes.txt"], "got the ending '.txt'"),
        (["gone.jsonl"], "no such file"),
        ("x" * 5000, "is neither a file"),
        ("x" * 5000 + ".jsonl", "no such file"),
        ("/" + "x" * 5000, "wanted a file ending"),
        ("./" + "x/" * 2500, "wanted a file ending"),
        ("x" * 5000 + "/*", "fit this pattern, got none"),
        ("a\0b.jsonl", "no such file"),
    ],
)
def test_paths_that_cannot_be_used(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    config = SourceConfig(name="s", kind="rl", path=path, rewards={"accuracy": "accuracy"})
    with pytest.raises(DataError, match=message) as caught:
        open_rows(config, 0)
    assert len(str(caught.value)) < 400


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", table(2, "q"))
    assert texts(open_rows(source("~/rows.jsonl"), 0)) == ["q0", "q1"]
    assert texts(open_rows(source("~/*.jsonl"), 0)) == ["q0", "q1"]
    assert image_folder(source("~/rows.jsonl", images="image")) == tmp_path
    assert image_folder(source(images="image", image_folder="~/x")) == tmp_path / "x"


def test_folder_of_images_of_several_files(tmp_path):
    for name in ("a", "b", "deep/c"):
        write(tmp_path / f"{name}.jsonl", table(1, "q"))
    assert image_folder(source(f"{tmp_path}/*.jsonl", images="image")) == tmp_path
    with pytest.raises(DataError, match="lie in 2 folders, such as .*image_folder"):
        image_folder(source(f"{tmp_path}/**/*.jsonl", images="image"))
    assert image_folder(source(images="image")) is None


# -- paths


def rows_file(path, *questions):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    return path


LONG = "x" * 5000


@pytest.mark.parametrize(
    "path",
    [f"{LONG}.jsonl", LONG, f"{LONG}*.json", "/y" * 2500, "/y" * 2500 + "/*.jsonl", f"~/{LONG}",
     "a\0b.jsonl"],
)  # fmt: skip
def test_paths_that_no_system_takes(path):
    for given in (path, [path]):
        config = SourceConfig(name="s", kind="sft", path=given)
        with pytest.raises(DataError) as error:
            open_rows(config, 0)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "path", ["https://host/rows.jsonl", "file:///rows.jsonl", "hf://datasets/a/b", "s3://b/*.jsonl"]
)
def test_urls_are_not_read(path):
    with pytest.raises(DataError, match="URLs are not read: give a file"):
        open_rows(source(path), 0)


def test_endings_in_upper_case(tmp_path):
    rows_file(tmp_path / "a.JSONL", "a")
    (tmp_path / "b.Json").write_text('[{"question": "b", "answer": "1"}]')
    config = SourceConfig(name="s", kind="sft", path=[f"{tmp_path}/a.JSONL", f"{tmp_path}/*.Json"])
    rows = open_rows(config, 0)
    assert [rows[0]["question"], rows[1]["question"]] == ["a", "b"]


def test_a_file_that_is_named_twice_is_taken_once(tmp_path, monkeypatch):
    rows_file(tmp_path / "a.jsonl", "a")
    rows_file(tmp_path / "b.jsonl", "b")
    os.symlink("a.jsonl", tmp_path / "c.jsonl")
    monkeypatch.chdir(tmp_path)
    config = SourceConfig(name="s", kind="sft", path=["b.jsonl", "*.json*", "./a.jsonl"])
    rows = open_rows(config, 0)
    assert [rows[i]["question"] for i in range(len(rows))] == ["b", "a"]

"""Every example loads, and the paper's read data sets of the shapes that their comments describe.

The data sets themselves cannot be had here: their tables are rebuilt with the same columns and
types, and one or two rows.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import datasets
import pytest
import yaml

from recap_fast.config import DataConfig, SourceConfig, load_config
from recap_fast.data.mix import DataStream
from recap_fast.data.shares import mixing_shares
from recap_fast.rewards.functions import BUILTIN
from recap_fast.types import RewardSample
from tests.vision_rows import encoded, encoder, picture, vision_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
HYBRID = EXAMPLES / "recap-qwen2.5-vl-7b-hybrid.yaml"
RLVR = EXAMPLES / "recap-qwen2.5-vl-3b-rlvr.yaml"
BASELINES = sorted((EXAMPLES / "hybrid-baselines").glob("*.yaml"))

TEXT, IMAGE = datasets.Value("string"), datasets.Image()


@cache
def cell(seed=0, size=(112, 56)):
    return {"bytes": encoded(picture(*size, seed=seed), "JPEG"), "path": None}


def thinklite():
    rows = [
        {"image": cell(i), "problem": f"<image>How many in {i}? Choices:\n(A) 2\n(B) 3", "id": i,
         "answer": "B", "choices": ["2", "3"], "ground_truth": "B"}
        for i in range(4)
    ]  # fmt: skip
    features = {"image": IMAGE, "problem": TEXT, "id": datasets.Value("int64"), "answer": TEXT,
                "choices": datasets.List(TEXT), "ground_truth": TEXT}  # fmt: skip
    return rows, features


def refcoco():
    rows = [
        {"file_name": f"{i}_0.jpg", "ref_id": i, "split": "train",
         "sentences": [{"raw": f"left {i}", "sent": f"left {i}", "sent_id": i, "tokens": ["left"]}],
         "image_path": f"coco/train2014/COCO_train2014_{i}.jpg", "bbox": [20.0, 10.0, 100.0, 60.5],
         "captions": [f"left {i}", "the left one"], "raw_anns": "{}"}
        for i in range(4)
    ]  # fmt: skip
    return rows, None


def onevision():
    rows = [
        {"id": str(i), "image": cell(i, (1400, 700)), "data_source": "ocr",
         "conversations": [{"from": "human", "value": f"<image>\nTranscribe {i}."},
                           {"from": "gpt", "value": f"text {i}"}]}
        for i in range(4)
    ]  # fmt: skip
    turn = {"from": TEXT, "value": TEXT}
    features = {"id": TEXT, "image": IMAGE, "data_source": TEXT,
                "conversations": datasets.List(turn)}  # fmt: skip
    return rows, features


def problems(solution, problem="Which one?"):
    rows = [{"image": cell(i), "problem": f"{problem} {i}", "solution": solution} for i in range(4)]
    return rows, {"image": IMAGE, "problem": TEXT, "solution": TEXT}


TABLES = {
    "russwang/ThinkLite-VL-70k": thinklite,
    "jxu124/refcoco": refcoco,
    "lmms-lab/LLaVA-OneVision-Data": onevision,
    "yiqingliang/lisa-problems-dataset": lambda: problems("<answer>[0.1, 0.2, 0.5, 0.6]</answer>"),
    "yiqingliang/geoqav-problems-dataset": lambda: problems("<answer>C</answer>"),
    "yiqingliang/sat-problems-dataset": lambda: problems("<answer>B</answer>"),
    "yiqingliang/scienceqa-problems-dataset": lambda: problems("<answer>A</answer>"),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        rows, features = TABLES[path]()
        return datasets.Dataset.from_list(rows, features and datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folder = tmp_path / "data/coco/train2014"
    folder.mkdir(parents=True)
    for number in range(4):
        picture(224, 112, seed=number).save(folder / f"COCO_train2014_{number}.jpg")
    monkeypatch.chdir(tmp_path)
    return asked


def rows_of(path):
    config = load_config(path, [f"data.sources.{i}.held_out=1" for i in range(_sources(path))])
    stream = DataStream(config.data, vision_tokenizer(), 0, encoder(max_pixels=28 * 28 * 512))
    return config, stream.next_step(), stream


def _sources(path):
    return len(load_config(path).data.sources)


def score(prompt, source, completion):
    sample = RewardSample(completion, prompt.answer, prompt.entry, 1, 1, "stop")
    scores = {}
    for name, spec in source.rewards.items():
        function = spec if isinstance(spec, str) else spec.function
        parameters = {} if isinstance(spec, str) else spec.parameters
        scores[name] = BUILTIN[function](sample, **parameters)
    return scores


@pytest.mark.parametrize(
    "path",
    sorted(set(EXAMPLES.rglob("*.yaml")) - set(EXAMPLES.glob("cluster/*"))),
    ids=lambda path: path.stem,
)
def test_example_loads(path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config = load_config(path)
    assert config.run.startswith("runs/")
    assert config.objectives


def test_objectives_of_the_paper(hub):
    names = {(o.name, o.kind) for o in load_config(HYBRID).objectives}
    assert names == {
        ("accuracy", "reward"), ("thinking_format", "reward"), ("iou", "reward"),
        ("answer_format", "reward"), ("ntp", "loss"),
    }  # fmt: skip
    assert {o.name for o in load_config(RLVR).objectives} == {"accuracy", "thinking_format", "iou"}
    assert all(load_config(path).rollout.group_size == 4 for path in (HYBRID, RLVR))


def test_hybrid_rows(hub):
    config, step, stream = rows_of(HYBRID)
    assert ("lmms-lab/LLaVA-OneVision-Data", "iam(cauldron)", "train") in hub
    assert len(hub) == 10
    by_name = {source.name: source for source in config.data.sources}
    assert stream.skipped == {}
    reasoning = next(prompt for prompt in step.prompts if prompt.source == "thinklite")
    assert reasoning.text.startswith("<image>How many")
    assert "<think> </think>" in reasoning.text
    right = "<think>I count.</think><answer>B</answer>"
    assert score(reasoning, by_name["thinklite"], right) == {"accuracy": 1, "thinking_format": 1}
    grounding = next(prompt for prompt in step.prompts if prompt.source == "refcoco")
    assert f"describes: left {grounding.row}." in grounding.text
    assert grounding.entry["model_image_sizes"] == [[224, 112]]
    box = "<answer>[20, 10, 100, 60]</answer>"
    scores = score(grounding, by_name["refcoco"], box)
    assert scores["iou"] == pytest.approx(50 / 50.5)
    assert scores["answer_format"] == 1
    written = step.supervised[0]
    text = vision_tokenizer().decode(written.token_ids[written.num_prompt_tokens :])
    assert text.startswith("<answer>text ")
    assert written.images[0].image.size == (504, 252)  # 512 x 256, in multiples of 28


def test_rlvr_rows(hub):
    config, step, stream = rows_of(RLVR)
    assert stream.skipped == {}
    answers = {"geoqav": "C", "sat": "B", "scienceqa": "A"}
    by_name = {source.name: source for source in config.data.sources}
    assert {prompt.source for prompt in step.prompts} == set(by_name)
    for prompt in step.prompts:
        source = by_name[prompt.source]
        if prompt.source == "lisa":
            near = "<think>x</think><answer>[12, 11, 56, 34]</answer>"
            assert score(prompt, source, near) == {"iou": 1, "thinking_format": 1}
            far = "<think>x</think><answer>[60, 40, 100, 50]</answer>"
            assert score(prompt, source, far)["iou"] == 0
        else:
            right = f"<think>x</think><answer>{answers[prompt.source]}</answer>"
            assert score(prompt, source, right) == {"accuracy": 1, "thinking_format": 1}


SIZES = {"thinklite": 70_000, "refcoco": 42_000, "ocr": 28_000}


def test_baselines():
    runs = set()
    for path in BASELINES:
        config = load_config(path)
        runs.add(config.run)
        assert config.reweighting.method == "uniform"
        assert (config.loss.kl_coef > 0) == (path.stem == "lwf")
        assert [source.name for source in config.data.sources] == list(SIZES)
        expected = {
            "coreset": [2 / 3, 1 / 6, 1 / 6],
            "lwf": [1 / 3, 1 / 3, 1 / 3],
            "propmix": [0.5, 0.3, 0.2],
            "reasoning-only": [1.0, 0.0, 0.0],
            "uniform": [1 / 3, 1 / 3, 1 / 3],
        }[path.stem]
        assert mixing_shares(config.data, SIZES) == pytest.approx(expected), path.stem
    assert len(runs) == 5


# -- the same data sets as others publish them; docs/data.md shows these sources


OTHERS = {
    "derek-thomas/ScienceQA": """
        question: [hint, question]
        choices: choices
        images: image
    """,
    "array/SAT": """
        choices: answers
        answer: correct_answer
        images: image_bytes
    """,
    "leonardPKU/GEOQA_R1V_Train_8K": """
        question: problem
        answer: solution
        images: image
    """,
    "rec_jsons_processed": """
        question: conversations.0.value
        answer: conversations.1.value
        images: image
    """,
}


def other_tables(folder):
    picture(112, 56).save(folder / "COCO_0.jpg")
    science = [
        {"image": cell(), "question": "Which is north?", "choices": ["left", "up"], "answer": 1,
         "hint": "Look at the map."},
        {"image": None, "question": "What is 1 + 1?", "choices": ["2", "3"], "answer": 0,
         "hint": ""},
    ]  # fmt: skip
    sat = [
        {"image_bytes": [cell(1), cell(2)], "question": "Did it move?", "question_type": "action",
         "answers": ["yes", "no"], "correct_answer": "no"}
    ]  # fmt: skip
    return {
        "derek-thomas/ScienceQA": (science, {
            "image": IMAGE, "question": TEXT, "choices": datasets.List(TEXT),
            "answer": datasets.Value("int8"), "hint": TEXT,
        }),
        "array/SAT": (sat, {
            "image_bytes": datasets.List(IMAGE), "question": TEXT, "question_type": TEXT,
            "answers": datasets.List(TEXT), "correct_answer": TEXT,
        }),
        "leonardPKU/GEOQA_R1V_Train_8K": (
            [{"image": cell(), "problem": "Find x.", "solution": "<answer> 145° </answer>"}],
            {"image": IMAGE, "problem": TEXT, "solution": TEXT},
        ),
        "rec_jsons_processed": (
            [{"image": "COCO_0.jpg", "conversations": [
                {"from": "human", "value": "<image>Where is the left one?"},
                {"from": "gpt", "value": [10, 20, 50, 40]}]}],
            None,
        ),
    }  # fmt: skip


RIGHT = {
    "derek-thomas/ScienceQA": {"Which": "(B)", "What": "2"},
    "array/SAT": {"Did": "no"},
    "leonardPKU/GEOQA_R1V_Train_8K": {"Find": "145°"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes(name, tmp_path, monkeypatch):
    rows, features = other_tables(tmp_path)[name]
    path = name
    if features is None:
        file = tmp_path / "refcoco_train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = str(file)
    else:
        table = datasets.Dataset.from_list(rows, datasets.Features(features))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    is_box = features is None
    source = SourceConfig(
        name="s", kind="rl", path=path, held_out=0, **yaml.safe_load(OTHERS[name]),
        rewards={"iou": "iou"} if is_box else {"accuracy": "accuracy"},
    )  # fmt: skip
    stream = DataStream(
        DataConfig(sources=[source], batch_size=len(rows)), vision_tokenizer(), 0, encoder()
    )
    prompts = stream.next_step().prompts
    assert len(prompts) == len(rows)
    for prompt in prompts:
        if is_box:
            assert score(prompt, source, "<answer>[10, 20, 50, 40]</answer>") == {"iou": 1.0}
            continue
        answer = next(v for k, v in RIGHT[name].items() if k in prompt.text)
        assert accuracy(source, prompt, answer) == 1.0
        assert accuracy(source, prompt, "something else") == 0.0
    if name == "derek-thomas/ScienceQA":
        texts = {prompt.text for prompt in prompts}
        assert texts == {
            "Look at the map.\nWhich is north?\n(A) left\n(B) up",
            "What is 1 + 1?\n(A) 2\n(B) 3",
        }


def accuracy(source, prompt, answer):
    """As a run computes it, told of the source's options."""
    spec = source.reward_specs["accuracy"]
    sample = RewardSample(f"<answer>{answer}</answer>", prompt.answer, prompt.entry, 1, 1, "stop")
    return BUILTIN[spec.function](sample, **spec.parameters)

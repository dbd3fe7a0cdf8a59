from __future__ import annotations

import shlex
import sys

import pytest
import typer
import yaml

from recap_fast import cli
from tests.tiny import save_tiny_model, tiny_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path, model):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(tmp_path, model)))
    return file


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command line in this process. Returns exit status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recap-fast", *map(str, arguments)])
        monkeypatch.setattr("recap_fast.rollout.preload.ensure_preload", lambda: None)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        output = capfd.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return call


def expect_user_error(result, *words: str) -> None:
    status, _, error = result
    assert status == 2, error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 24
    flat = " ".join(error.split())  # rich wraps lines
    for word in words:
        assert word in flat or word.replace(" ", "") in flat.replace(" ", "")


def with_rows(tmp_path, content: str | bytes, name: str = "rows.jsonl") -> str:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def use_file(path: str) -> list[str]:
    values = ("reasoning_gym=null", "parameters={}", "size=10000", f"path={path}")
    return [word for value in values for word in ("--set", f"data.sources.0.{value}")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lerning_rate=1"], ["optimizer.lerning_rate", "learning_rate"]),
        (["training.steps=many"], ["training.steps", "integer", "many"]),
        (["loss.kl_coef=0.1"], ["kl_coef", "model.reference"]),
        (["rollout.group_size=1"], ["group_size", "std"]),
        (["model.path=/no/such/model"], ["model.path", "/no/such/model"]),
        (["data.sources.0.rewards={length: acuracy}"], ["acuracy", "accuracy"]),
        (["data.sources.0.rewards={length: 'no_such:thing'}"], ["no_such"]),
        (
            ["data.sources.0.rewards={length: 'tests.tiny_rewards:thing'}"],
            ["thing", "tests.tiny_rewards"],
        ),
        (["data.sources.0.reasoning_gym=chain_sums"], ["chain_sums", "chain_sum"]),
        (["data.sources.0.parameters={min_trms: 2}"], ["min_trms", "min_terms"]),
        (["data.max_prompt_tokens=5"], ["prompt_too_long", "max_prompt_tokens"]),
        (["reweighting.parameters={windw: 3}"], ["windw", "window"]),
        (["rollout.engine=sglang"], ["rollout.engine", "sglang"]),
        (["nonsense"], ["nonsense", "key=value"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_settings(run, config, overrides, words):
    arguments = [part for override in overrides for part in ("--set", override)]
    expect_user_error(run("train", config, *arguments), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": "c", \n', ["rows.jsonl:2"]),
        ('{"question": "a"}\n' * 80, ["answer", "rows.jsonl:1"]),
        ('{"answer": "a"}\n' * 80, ["question", "rows.jsonl:1"]),
        ("", ["rows.jsonl", "empty"]),
        ('{"question": 3, "answer": "b"}\n' * 80, ["question", "rows.jsonl:1"]),
        (b"\xff\xfe\n", ["rows.jsonl:1"]),
    ],
)
def test_bad_rows(run, config, tmp_path, content, words):
    path = with_rows(tmp_path, content)
    expect_user_error(run("train", config, *use_file(path)), *words)


def test_missing_data_file(run, config, tmp_path):
    path = tmp_path / "absent.jsonl"
    expect_user_error(run("train", config, *use_file(str(path))), "absent.jsonl")


def test_unsupported_data_file(run, config, tmp_path):
    path = with_rows(tmp_path, "x", "rows.csv")
    expect_user_error(run("train", config, *use_file(path)), "rows.csv", ".jsonl", ".parquet")


def test_missing_config(run, tmp_path):
    expect_user_error(run("train", tmp_path / "absent.yaml"), "absent.yaml", "no such file")


def test_folder_that_is_no_run(run, tmp_path):
    expect_user_error(run("report", tmp_path), str(tmp_path.name))
    expect_user_error(run("eval", tmp_path), "neither a run", "config.yaml", "nor a checkpoint")
    expect_user_error(run("eval", tmp_path / "absent"), "absent", "no such file or folder")
    expect_user_error(run("eval", "x" * 5000), "no such file or folder")


def test_unknown_benchmark(run):
    expect_user_error(run("bench", "losses"), "losses", "policy_loss", "step")


def scores_of(result) -> dict[str, str]:
    status, output, error = result
    assert status == 0, error
    return dict(line.split("\t") for line in output.splitlines() if "\t" in line)


def test_eval_without_a_checkpoint(run, model, tmp_path):
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    settings = tiny_settings(tmp_path, model)
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for place in (run_folder, run_folder / "checkpoints"):
        expect_user_error(run("eval", place), "no checkpoint to evaluate", "config.yaml")
    expect_user_error(run("eval", model), "without a run", "eval CONFIG --set model.path=")


@pytest.mark.parametrize("name", ["x" * 5000, "/y" * 2500])
def test_names_too_long_for_the_system(run, config, tmp_path, name):
    expect_user_error(run("train", config, "--set", f"run={name}"), "cannot be made a folder")
    expect_user_error(run("train", name), "cannot be read")
    for number, path in enumerate((f"{name}.jsonl", f"{name}/*.json", name, f"[{name}.jsonl]")):
        folder = ("--set", f"run={tmp_path / str(number)}")
        expect_user_error(run("train", config, *use_file(path), *folder), "source 'sums'")


def test_train_eval_resume_and_report(run, config, tmp_path, caplog):
    status, output, _ = run("train", config, "--set", "training.steps=2")
    assert status == 0
    assert "report.html" in output
    report = tmp_path / "run" / "report.html"
    assert report.exists()

    expect_user_error(run("train", config), "--resume", "--overwrite")
    status, output, _ = run("train", config, "--resume", "--set", "training.steps=2")
    assert status == 0
    assert "finished: 2 of 2 steps" in output
    assert f"recap-fast eval {tmp_path / 'run'}" in output
    more = next(line for line in output.splitlines() if "--resume" in line)
    more = shlex.split(more.partition("recap-fast ")[2])
    assert more == [
        "train", f"{tmp_path / 'run'}/config.yaml", "--resume", "--set", "training.steps=4",
    ]  # fmt: skip

    status, output, _ = run(*more)
    assert status == 0
    assert "finished 4 steps" in output

    checkpoints = tmp_path / "run" / "checkpoints"
    newest = scores_of(run("eval", tmp_path / "run"))
    assert {"eval/sums/length", "eval/words/loss"} <= newest.keys()
    assert f"evaluating {checkpoints / 'step-000004'}, the newest of 2" in caplog.messages
    assert scores_of(run("eval", checkpoints / "step-000002")) != newest
    expect_user_error(run("eval", tmp_path / "run", "--set", "model.path=x"), "model.path", "names")

    report.unlink()
    status, _, _ = run("report", tmp_path / "run")
    assert status == 0
    assert report.exists()


def test_numbers_of_a_part_are_told_apart_or_named() -> None:
    assert cli._numbers("--shares", "10,20") == [10, 20]
    assert cli._numbers("--shares", None) is None
    with pytest.raises(typer.BadParameter, match="--seeds: wanted whole numbers as 10,20, got 0-4"):
        cli._numbers("--seeds", "0-4")

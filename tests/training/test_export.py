from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from recap_fast.training import export, safetensors_writer
from recap_fast.training.checkpoint import CheckpointError, TrainerState
from recap_fast.training.export import export_model
from recap_fast.training.sharded_checkpoint import CheckpointSaver
from tests.processes import launched, run_ranks
from tests.tiny import packed_vision_model, tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer

SCRIPT = Path(__file__).with_name("export_ranks.py")
KINDS = ["tied", "untied", "vision"]
STEP = "step-000003"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of each kind of model, with a checkpoint in several files."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_writer, "FILE_BYTES", 60_000)
        for kind in KINDS:
            save(folder / kind, model_of(kind))
    return folder


def model_of(kind: str) -> torch.nn.Module:
    if kind != "vision":
        return tiny_llama(tied=kind == "tied")
    model = packed_vision_model("qwen2_5_vl")
    model.model.visual.to(torch.bfloat16)  # as what is frozen and was published so
    return model


def save(run: Path, model: torch.nn.Module) -> Path:
    state = TrainerState(3, {"drawn": 3}, {"step": torch.tensor(3)})
    return CheckpointSaver(run / "checkpoints", model, tiny_tokenizer(), keep=1).start(state)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_model_alone(runs, tmp_path, kind):
    """And goes into one file, where the checkpoint is in several."""
    checkpoint = runs / kind / "checkpoints" / STEP
    before = contents(checkpoint)
    assert len(list(checkpoint.glob("model-*-of-*.safetensors"))) > 2
    for source, output in [(runs / kind, tmp_path / "a"), (checkpoint, tmp_path / "b" / "c")]:
        assert export_model(source, output) == output
        assert_equal(weights_of(output), weights_of(checkpoint))
        kept = {name for name in before if "safetensors" not in name and "trainer" not in name}
        assert contents(output).keys() == kept | {"model.safetensors"}
        assert {name: before[name] for name in kept}.items() <= contents(output).items()
    assert contents(checkpoint) == before
    auto = AutoModelForImageTextToText if kind == "vision" else AutoModelForCausalLM
    model, loading = auto.from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    if kind != "vision":
        assert_equal(dict(model.state_dict()), dict(model_of(kind).state_dict()))
    assert AutoTokenizer.from_pretrained(output).eos_token_id is not None


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_work_and_write_what_one_would(runs, tmp_path, processes, monkeypatch):
    """Into several files, and the rows of one tensor by several processes."""
    dtypes = {"tied": None, "untied": None, "vision": "bfloat16"}
    jobs = json.dumps([(str(runs / kind), kind, dtype) for kind, dtype in dtypes.items()])
    out = tmp_path / "out"
    reports = run_ranks(SCRIPT, processes, tmp_path, "write", str(out), jobs, "50000", "4096")
    assert sorted(path.name for path in out.iterdir()) == sorted(dtypes)
    monkeypatch.setattr(safetensors_writer, "FILE_BYTES", 50_000)
    for kind, dtype in dtypes.items():
        assert contents(out / kind) == contents(export_model(runs / kind, tmp_path / kind, dtype))
        weights = weights_of(out / kind)
        shares = [sum(report[kind]) for report in reports]
        assert sum(shares) == sum(tensor.nbytes for tensor in weights.values())
        assert max(shares) - min(shares) <= 2 * 4096
        assert max(size for report in reports for size in report[kind]) <= 4096
        check_index(out / kind, weights)
        if kind != "vision":
            model = AutoModelForCausalLM.from_pretrained(out / kind)
            assert_equal(dict(model.state_dict()), dict(model_of(kind).state_dict()))


def check_index(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """What loaders of shards go by: every tensor is in the file that the index names, and no file
    is beside those."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name for path in folder.glob("*.safetensors")}
    assert len(files) > 1
    assert files == set(index["weight_map"].values())
    for file in files:
        with safe_open(folder / file, framework="pt") as stored:
            wanted = {name for name, where in index["weight_map"].items() if where == file}
            assert set(stored.keys()) == wanted
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_converted(runs, tmp_path, dtype):
    """All of them, and the configurations say so: of the model and of its parts."""
    output = export_model(runs / "vision", tmp_path / "out", dtype)
    before = weights_of(runs / "vision" / "checkpoints" / STEP)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32, torch.bfloat16}
    kind = getattr(torch, dtype)
    assert_equal(weights_of(output), {name: tensor.to(kind) for name, tensor in before.items()})
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == dtype
    assert config["vision_config"]["dtype"] == dtype
    loaded = AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {kind}


def checkpoint_with(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    run = folder / "run"
    checkpoint = save(run, tiny_llama())
    save_file(tensors, checkpoint / "model.safetensors")
    return run


def test_scalars_empty_tensors_and_whole_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_PIECE_BYTES", 16)
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "ids": torch.arange(9)}
    tensors |= {"wide": torch.randn(3, 50), "no columns": torch.empty(3, 0)}
    run = checkpoint_with(tmp_path, tensors)
    assert_equal(weights_of(export_model(run)), tensors)
    narrow = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    assert_equal(weights_of(export_model(run, tmp_path / "narrow", "bfloat16")), narrow)


def test_values_that_a_dtype_cannot_hold(tmp_path):
    run = checkpoint_with(tmp_path, {"x": torch.tensor([1.0, -7e4, torch.inf])})
    message = r"model.safetensors: x has values up to 7e\+04, which float16 cannot hold: give"
    with pytest.raises(CheckpointError, match=message):
        export_model(run, tmp_path / "out", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export_model(run, tmp_path / "out", "bfloat16")


def test_a_second_export_says_where_the_first_is(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "tied", run)
    first = export_model(run)
    assert first == run / "export" / STEP
    before = contents(first)
    message = f"{STEP} has been exported before, and is in {re.escape(str(first))}: use .*--output"
    with pytest.raises(CheckpointError, match=message):
        export_model(run, dtype="bfloat16")
    assert contents(first) == before
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there: wanted a folder that is not there yet"):
        export_model(run, tmp_path / "there")
    with pytest.raises(CheckpointError, match="nothing: wanted a run with a checkpoint"):
        export_model(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["gone", "cut", "not indexed"])
def test_a_checkpoint_that_is_not_whole(runs, tmp_path, damage):
    checkpoint = tmp_path / STEP
    shutil.copytree(runs / "untied" / "checkpoints" / STEP, checkpoint)
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 100)
    else:
        save_file({"other": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=file.name):
        export_model(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [STEP]


def test_what_an_export_that_was_killed_has_left_is_cleared_away(runs, tmp_path):
    left = tmp_path / ".out.tmp"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    output = export_model(runs / "tied", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


def test_an_output_that_cannot_be_made(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file.*: cannot be written: Not a directory"):
        export_model(runs / "tied", tmp_path / "file" / "out")


@pytest.mark.slow
@pytest.mark.variant
def test_the_command_in_two_processes(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "untied", run)
    done = launched(2, "-m", "recap_fast", "export", str(run), "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    output = run / "export" / STEP
    assert done.stdout.split() == [str(output)]
    before = weights_of(run / "checkpoints" / STEP)
    assert_equal(weights_of(output), {name: t.bfloat16() for name, t in before.items()})
    again = launched(2, "-m", "recap_fast", "export", str(run))
    expect_one_message(again, f"{STEP} has been exported before, and is in {output}: use that")


def expect_one_message(done: subprocess.CompletedProcess[str], message: str) -> None:
    """In all that the processes have printed; each of them ends with status 2."""
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert said.count("error:") == 1, said
    assert said.replace(" ", "").count(message.replace(" ", "")) == 1, said
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0]
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_write_ends_all_with_one_message(runs, tmp_path, rank):
    output = tmp_path / "out"
    done = launched(
        2, str(SCRIPT), "limited", str(rank), "export", str(runs / "tied"), "--output", str(output)
    )
    named = f"rank {rank}: " if rank else ""
    wanted = f"error: {named}{tmp_path}/.out.tmp/model.safetensors: cannot be written: File too"
    expect_one_message(done, wanted)
    assert list(tmp_path.iterdir()) == []

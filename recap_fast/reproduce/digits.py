"""The base model of the digit scenes: Qwen2.5-VL's architecture at 1.2 million parameters.

Nothing is downloaded. A tokenizer is made from the scenes' own words, a model with random weights
is saved beside it as a model folder like any other, and the trainer's supervised path teaches it
all three tasks from answers (`pretraining_config`). Thoughts make it far better at `range`, but it
is taught to think them where they are not asked for: to the prompt that asks for them it mostly
replies with an answer alone. Reinforcement has to find that, as it has in a large model.

    recap-fast reproduce digits --base-only
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_fast.config import TrainConfig
from recap_fast.data.digit_scenes import HEIGHT, TASKS, WIDTH, SceneRows
from recap_fast.data.prompts import TEMPLATES
from recap_fast.model.errors import ModelError
from recap_fast.model.model_path import cache_folder
from recap_fast.report.metrics import read_metrics
from recap_fast.reproduce.grid import Cell, run_grid
from recap_fast.training.checkpoint import latest_checkpoint

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

SCORES_FILE = "scores.json"

_VERSION = 2
"""Part of the cache's key: raise it when a change makes old bases wrong."""

_PATCH, _MERGE = 4, 2  # pixels of a patch's side; patches of an image token's side
_VISION_HEAD, _TEXT_HEAD = 32, 32  # channels of an attention head
_NUM_WORD_ROWS = 200  # rows of each task whose words the tokenizer learns; templates repeat soon
_HELD_OUT = 32  # rows of each source that the pretraining is watched on
_MAX_POSITIONS = 1024

PROMPTS = {"range": "thinking", "locate": "box", "transcribe": "plain"}
"""Prompt template of each task, as in the paper: only reasoning is asked for thoughts."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One kind of row of the pretraining: a task, what its prompts ask for, and how it replies."""

    task: str
    column: str
    prompt: str
    share: float

    @property
    def name(self) -> str:
        return f"{self.task}_{self.column}_{self.prompt}"


LESSONS = (
    Lesson("range", "worked", "plain", 3.0),
    Lesson("range", "worked", "thinking", 0.5),
    Lesson("range", "short", "thinking", 1.0),
    Lesson("locate", "worked", "box", 5.0),
    Lesson("locate", "answer", "box", 2.0),
    Lesson("transcribe", "worked", "plain", 2.0),
)
"""What the base is taught. Finding the digit that a phrase means takes the most rows to learn."""

_PIECES = r"\[\d+|, \d+|\]| ?</?\w+>| ?\w+|\n| ?[^\s\w]+|\s"
"""Words with the space before them, tags, and the parts of a box: each becomes one token."""

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's conversation, without its default system message."""


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """What determines a base. Two bases with equal settings are the same."""

    text_width: int = 128
    text_layers: int = 4
    vision_width: int = 96
    vision_layers: int = 2
    reading_steps: int = 500
    """Steps of transcription alone. A model that reads learns the rest several times faster."""
    steps: int = 2000
    """Steps of all tasks."""
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def key(self) -> str:
        content = json.dumps([_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where the finished base is cached."""
        return cache_folder() / f"digits-{self.key}"


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer in which every word of the scenes is one token; other text falls
    apart into bytes and comes back unchanged."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,  # more than there are merges: it stops when every word is whole
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(_SPECIAL),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(seed), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(seed: int) -> Iterator[str]:
    """Every word that a prompt or a good reply can hold."""
    yield from ("user\n", "assistant\n", "system\n")
    for number in range(max(WIDTH, HEIGHT) + 1):
        yield f"{number} {number}"
        yield f"[{number}, {number}]"
    for task in TASKS:
        rows = SceneRows(task, size=_NUM_WORD_ROWS, held_out=0, seed=seed)
        for index in range(len(rows)):
            row = rows[index]
            for template in TEMPLATES.values():
                yield template.replace("{question}", row["question"])
            yield row["worked"]
            yield row["short"]


def model_config(settings: BaseSettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL's configuration at the settings' size, with the tokenizer's ids."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    text_heads = settings.text_width // _TEXT_HEAD
    sixth = _TEXT_HEAD // 16  # of half a head: 2/8 time, 3/8 height, 3/8 width, as Qwen splits it
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": settings.text_width,
            "intermediate_size": 8 * settings.text_width // 3 // 8 * 8,
            "num_hidden_layers": settings.text_layers,
            "num_attention_heads": text_heads,
            "num_key_value_heads": text_heads // 2,
            "max_position_embeddings": _MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2 * sixth, 3 * sixth, 3 * sixth],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "initializer_range": settings.text_width**-0.5,
        },
        vision_config={
            "depth": settings.vision_layers,
            "hidden_size": settings.vision_width,
            "intermediate_size": 2 * settings.vision_width,
            "num_heads": settings.vision_width // _VISION_HEAD,
            "out_hidden_size": settings.text_width,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            # Windows of half a canvas in the first block, everything in the others.
            "window_size": HEIGHT,
            "fullatt_block_indexes": list(range(1, settings.vision_layers)),
            "initializer_range": settings.vision_width**-0.5,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def save_untrained(settings: BaseSettings, folder: Path) -> None:
    """Writes a model folder with random weights: model, tokenizer, image processor."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Qwen2_5_VLForConditionalGeneration(model_config(settings, tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    side = _PATCH * _MERGE
    processor = Qwen2VLImageProcessorPil(
        patch_size=_PATCH,
        merge_size=_MERGE,
        size={"shortest_edge": side * side, "longest_edge": 4 * WIDTH * HEIGHT},
        # Paper, which is black here, becomes 0.
        image_mean=[0.0] * 3,
        image_std=[0.5] * 3,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def supervised_sources(size: int) -> list[dict[str, Any]]:
    """Sources of the pretraining, `size` rows each: the LESSONS."""
    return [
        {
            "name": lesson.name,
            "kind": "sft",
            "digit_scenes": lesson.task,
            "size": size,
            "images": "image",
            "answer": lesson.column,
            "prompt": lesson.prompt,
            "held_out": _HELD_OUT,
        }
        for lesson in LESSONS
    ]


def pretraining_config(
    settings: BaseSettings, model: Path, run: Path, *, reading: bool = False
) -> TrainConfig:
    """One of the two runs that make a base out of the model that `save_untrained` wrote.

    Args:
        model: what the run starts from.
        reading: the first run, of transcription alone.
    """
    steps = settings.reading_steps if reading else settings.steps
    shares = {
        lesson.name: lesson.share
        for lesson in LESSONS
        if lesson.task == "transcribe" or not reading
    }
    return TrainConfig.model_validate(
        {
            "run": str(run),
            "seed": settings.seed,
            "model": {"path": str(model), "dtype": "float32", "train_vision": True},
            "data": {
                "sources": supervised_sources(steps * settings.batch_size + _HELD_OUT),
                "batch_size": settings.batch_size,
                "mixing": shares,
                "max_supervised_tokens": 160,
            },
            "rollout": {"engine": "transformers"},
            "reweighting": {"method": "uniform"},
            "optimizer": {"learning_rate": settings.learning_rate, "betas": [0.9, 0.98]},
            "training": {"steps": steps, "max_tokens": 8192},
            "evaluation": {"before": False},
            "checkpoint": {"every": 250, "keep": 1},
            "logging": {"tensorboard": False, "rollouts_per_step": 0},
        }
    )


def base_scores(folder: Path) -> dict[str, float]:
    """What `ensure_base` recorded of a base: held-out scores, parameters, and seconds of building.

    Raises:
        ModelError: the folder is not a base.
    """
    try:
        content: dict[str, float] = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a base of the digit scenes: {error}") from error
    return content


def ensure_base(
    settings: BaseSettings, evaluation: Callable[[Path], TrainConfig], console: Console
) -> Path:
    """Returns the base's folder, after building it where the cache has none.

    A build that was interrupted goes on from where it was.

    Args:
        evaluation: gives the configuration whose held-out rows the base is scored on.
        console: where the progress is shown.

    Raises:
        GridError: the build was stopped, or failed.
    """
    folder = settings.folder
    if (folder / SCORES_FILE).exists():
        return folder
    from recap_fast.training.evaluate import evaluate_model

    building = folder.with_suffix(".building")
    untrained, finished = building / "untrained", building / "finished"
    if not (untrained / "preprocessor_config.json").exists():
        save_untrained(settings, untrained)
    model, seconds = untrained, 0.0
    for name in ("reading", "all tasks"):
        config = pretraining_config(settings, model, building / name, reading=name == "reading")
        run_grid([Cell(f"base, {name}", settings.seed, config)], 1, console)
        model = latest_checkpoint(building / name / "checkpoints")
        seconds += sum(row.get("time/total") or 0.0 for row in read_metrics(building / name))
    without_state = shutil.ignore_patterns("trainer", "trainer_state.*")
    shutil.copytree(model, finished, ignore=without_state, dirs_exist_ok=True)
    scores: dict[str, float] = evaluate_model(evaluation(finished), str(finished))
    scores["seconds"] = seconds
    (finished / SCORES_FILE).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    try:
        os.replace(finished, folder)
    except OSError:
        # Another process may have finished first; its result is as good.
        if not (folder / SCORES_FILE).exists():
            raise
    shutil.rmtree(building)
    return folder

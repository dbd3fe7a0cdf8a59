"""What is asked of a vLLM server for a prompt, and what it answers."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recap_fast.model.vision import VisionAdapter
from recap_fast.rollout.vllm import check_expansion
from recap_fast.types import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_LOGPROB = -9999.0
"""What vLLM gives in the place of a log-prob that is no number."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as a server gave it."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    """Of each token the version of the weights that sampled it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a server for one prompt."""

    prompt: Prompt
    token_ids: list[int]
    """The prompt's, with one token for each image."""
    n: int
    max_new_tokens: int
    temperature: float
    seed: int
    stop_token_ids: tuple[int, ...]
    vocabulary: int
    """How many tokens the model has: ids beyond are none."""
    vision: VisionAdapter | None = None
    priority: int = 0
    """Lower ones are sampled first."""

    @property
    def tokens(self) -> int:
        """What it may cost, for spreading the load."""
        return len(self.prompt.token_ids) + self.n * self.max_new_tokens

    def body(self, version: str, adapter: str | None = None) -> dict[str, Any]:
        """As `/inference/v1/generate` takes it, for weights of the given label.

        Args:
            adapter: the name that this version's adapters have on the server, if any.
        """
        body: dict[str, Any] = {
            "token_ids": self.token_ids,
            "priority": self.priority,
            "sampling_params": {
                "n": self.n,
                "max_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "top_p": 1.0,
                "top_k": 0,
                "seed": self.seed,
                "logprobs": 0,
                "detokenize": False,
                "stop_token_ids": list(self.stop_token_ids),
            },
        }
        if adapter is not None:  # by whose name the prefix cache goes
            body["model"] = adapter
        else:  # an update leaves keys and values of the old weights there
            body["cache_salt"] = f"version {version}"
        if self.prompt.images:
            # Likewise the features of images, which the server knows by these names.
            body["content_parts"] = [_image_part(x.image, version) for x in self.prompt.images]
            body["return_token_ids"] = True
        return body


def _image_part(image: Image, version: str) -> dict[str, str]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")  # lossless: the model sees these very pixels
    content = buffer.getvalue()
    return {
        "type": "image_url",
        "url": "data:image/png;base64," + base64.b64encode(content).decode(),
        "uuid": f"{version}-{hashlib.blake2b(content, digest_size=16).hexdigest()}",
    }


def read_completions(
    answer: Any, request: Request, version: int | Callable[[str], int]
) -> list[Completion]:
    """What a server answered, checked.

    Args:
        version: of all tokens, or of a label of weights, with which the server says it: of
            adapters it does not know.

    Raises:
        OtherRunError: tokens are from weights of another run.
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: it is not an answer to
            this request.
        EngineError: images became other tokens than the trainer's.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(request.n)):
        raise ValueError(f"wanted completions 0 to {request.n - 1}, got {len(choices)}")
    if request.prompt.images:
        check_expansion(request.prompt, answer["prompt_token_ids"], request.vision)
    return [_read_completion(choice, request, version) for choice in choices]


def _read_completion(
    choice: Mapping[str, Any], request: Request, version: int | Callable[[str], int]
) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"a completion ended for the reason {choice['finish_reason']!r}")
    token_ids = list(choice["token_ids"])
    if not all(type(token) is int for token in token_ids):  # int(6.7) would be another token
        raise TypeError(f"token ids that are not whole numbers: {token_ids[:8]}")
    if not all(0 <= token < request.vocabulary for token in token_ids):
        problem = f"token ids between {min(token_ids)} and {max(token_ids)}"
        raise ValueError(f"{problem}, of a vocabulary of {request.vocabulary}")
    content = choice["logprobs"]["content"]
    if not 1 <= len(token_ids) <= request.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens, wanted 1 to {request.max_new_tokens}")
    if [entry["token_id"] for entry in content] != token_ids:
        raise ValueError("log-probs of other tokens than it sampled")
    logprobs = [float(entry["logprob"]) for entry in content]
    if not all(_NO_LOGPROB < value < 1e-3 for value in logprobs):
        raise ValueError(f"log-probs between {min(logprobs)} and {max(logprobs)}")
    if isinstance(version, int):
        return Completion(token_ids, logprobs, [version] * len(token_ids))
    versions: list[int] = []
    for span in choice["weight_versions"]:
        if span["start"] != len(versions) or span["end"] <= span["start"]:
            raise ValueError(f"versions of weights with a gap: {choice['weight_versions']}")
        versions.extend([version(span["version"])] * (span["end"] - span["start"]))
    if len(versions) != len(token_ids):
        raise ValueError(f"versions of {len(versions)} of {len(token_ids)} tokens")
    return Completion(token_ids, logprobs, versions)

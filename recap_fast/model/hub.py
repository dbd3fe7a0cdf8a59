"""A model's folder for processes that each read a part of it."""

from __future__ import annotations

import os

from recap_fast.model.errors import ModelError
from recap_fast.model.model_path import resolve_model

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_LEFT_OUT = ["*/*", "consolidated*"]  # other formats of the same weights


def model_folder(path: str) -> str:
    """`resolve_model`, with a hub's name turned into the folder of its files in the hub's cache.

    Raises:
        ModelError: as `resolve_model` does; or the hub has no such model, or cannot be reached and
            the cache has it not.
    """
    found = resolve_model(path)
    if os.path.isdir(found):
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return snapshot_download(found, allow_patterns=_WANTED, ignore_patterns=_LEFT_OUT)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"model.path: {path} is no folder, and not to be had from the hub: give a folder's "
            f"path, or fetch it where there is a network (hf download {path}) into the cache that "
            f"HF_HOME names here: {first}"
        ) from error

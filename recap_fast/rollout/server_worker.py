"""What of ours runs inside a vLLM server: it takes weights over, and shows those that it has.

vLLM imports this file in its own processes: `register` through the entry point
`vllm.general_plugins`, and `WeightProbe` through `--worker-extension-cls`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recap_fast.rollout.server_process import end_with_keeper
from recap_fast.rollout.vllm_weights import read_columns

BACKEND = "recap_fast"
"""What `--weight-transfer-config` calls our transfers of weights."""
_SIZES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
EXTENSION = f"{__name__}.WeightProbe"


def register() -> None:
    """Makes `BACKEND` known to vLLM, in each of its processes, and has each end with the server's
    keeper. Releases without weight transfer are left alone."""
    if end_with_keeper():
        _fork_engine()
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory
    except ImportError:
        return
    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "recap_fast.rollout.server_transfer", "TransferEngine")


def _fork_engine() -> None:
    """On a CPU vLLM would spawn its engine, which then imports all that the HTTP process has
    imported: 20 s of a core and half a GiB. There is no CUDA that a fork would break."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.engine import utils

        utils.get_mp_context = partial(multiprocessing.get_context, "fork")


def digest(columns: Tensor) -> str:
    """Of a weight's columns, to the bit. Takes them in any dtype, on any device.

    What is no normal number counts as 0: read back as a product, -0.0 comes as 0.0, and processors
    may be set to take subnormal numbers for 0.
    """
    values = columns.detach().cpu().reshape(-1)
    is_tiny = values.abs() < torch.finfo(values.dtype).tiny
    found = values.masked_fill(is_tiny, 0.0).view(torch.uint8).numpy()
    return hashlib.blake2b(found.tobytes(), digest_size=8).hexdigest()


def adapter_digest(a: Tensor, b: Tensor) -> str:
    """Of one layer's adapter, A [r, in] and B [out, r], as it is computed with: scaled."""
    return digest(torch.cat([a.detach().reshape(-1), b.detach().reshape(-1)]))


def model_sizes(config: Any) -> dict[str, str]:
    """What tells one model from another, of the configuration of its text part (transformers')."""
    values = {name: getattr(config, name, None) for name in _SIZES}
    return {name: str(value) for name, value in values.items() if value is not None}


class WeightProbe:
    """Methods that vLLM adds to its workers, for `/collective_rpc` to call: with strings."""

    model_runner: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def recap_fast_end_update(self) -> dict[str, str]:
        """Ends an update of weights that was started and not finished: whoever did so is gone, and
        vLLM starts no other while one is open. Does what vLLM does where one fails."""
        if self._weight_update_active:
            self._weight_update_active = False
            self.weight_transfer_engine.reset_weight_update_target()
        return {}

    def recap_fast_model(self) -> dict[str, str]:
        """`model_sizes`; under "dtype" what it computes in, and under "backend" how it takes
        weights, if it does."""
        transfer = self.model_runner.vllm_config.weight_transfer_config
        backend = {} if transfer is None else {"backend": str(transfer.backend)}
        model = self.model_runner.model_config
        dtype = str(model.dtype).removeprefix("torch.")
        return model_sizes(model.hf_text_config) | {"dtype": dtype} | backend

    def recap_fast_digests(self, shapes: str, count: str) -> dict[str, str]:
        """`digest` of up to `count` columns of each weight, in the dtype that is computed in.

        Args:
            shapes: JSON; Hugging Face name -> shape, of every weight of the model.

        Returns:
            name -> digest. Weights whose place in vLLM's model could not be found are left out.
        """
        return {name: digest(columns) for name, columns in self._columns(shapes, count).items()}

    def recap_fast_columns(self, shapes: str, count: str) -> dict[str, list[str]]:
        """The columns themselves: name -> [rows, columns, little-endian float32 in base 64]."""
        return {
            name: [
                *map(str, columns.reshape(columns.shape[0], -1).shape),
                base64.b64encode(
                    columns.detach().float().cpu().contiguous().numpy().tobytes()
                ).decode(),
            ]
            for name, columns in self._columns(shapes, count).items()
        }

    def recap_fast_adapters(self, ranks: str) -> dict[str, dict[str, str]]:
        """Of each adapter that is ready to be sampled from, `adapter_digest` of its layers.

        Args:
            ranks: JSON; Hugging Face name of a layer -> rank of its adapter.

        Returns:
            vLLM's number of the adapter -> layer -> digest. Layers that vLLM gives no adapters are
            left out.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        wanted: dict[str, int] = json.loads(ranks)
        found: dict[str, dict[str, str]] = {}
        for slot, number in enumerate(manager.lora_index_to_id):
            if number is None:
                continue
            layers = found[str(number)] = {}
            for path, module in manager.modules.items():
                parts = manager.packed_modules.get(path, [path])
                for part, a, b in zip(
                    parts, module.lora_a_stacked, module.lora_b_stacked, strict=False
                ):
                    if rank := wanted.get(part):
                        layers[part] = adapter_digest(a[slot, 0, :rank], b[slot, 0, :, :rank])
        return found

    def _columns(self, shapes: str, count: str) -> dict[str, Tensor]:
        model = self.model_runner.get_model()
        dtype = self.model_runner.model_config.dtype
        columns = read_columns(model, json.loads(shapes), int(count))
        return {name: values.to(dtype) for name, values in columns.items()}

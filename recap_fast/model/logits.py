"""What models of transformers do to their logits beside the head's product."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""How configurations of transformers call the cap of their logits."""
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""How they call the factor of their logits; `logits_scaling` is another, mostly a divisor."""
OF_LOGITS = re.compile(r"^(?!attn|attention|router|gate)\w*(logit|lm_head)\w*(scal|cap|mult)\w*$")


def refuse_more_than_backbone_and_head(model: Any) -> None:
    """Refuses a model with more above its backbone than a head, as BERT's family has.

    Raises:
        ValueError: such a model, or one without a backbone in `base_model`.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if backbone is model:
        raise ValueError(
            f"{type(model).__name__}: wanted a model with its backbone in base_model, "
            f"got one without ({model.base_model_prefix!r} names none)"
        )
    for name, module in model.named_children():
        if module is not backbone and module is not head and any(True for _ in module.parameters()):
            raise ValueError(
                f"{type(model).__name__}: wanted nothing with parameters beside its backbone and "
                f"its head, got {name!r}, which may stand between the two"
            )


def scale_and_softcap(model: Any) -> tuple[float, float | None]:
    """By what a model multiplies its logits, and the cap that it then puts on them (None: none).

    Raises:
        ValueError: no number above 0; a setting that the model's own forward does not read, or one
            that changes the logits in a way that is not known here.
    """
    config = model.config.get_text_config()

    def number(key: str) -> float | None:
        value = getattr(config, key, None)  # MiniCPM3's is a property, and not in to_dict
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{key} of {config.model_type}: wanted a number > 0, got {value!r}")
        if value != 1 and not _forward_reads(model, key):
            raise ValueError(
                f"{key}={value!r} of {type(model).__name__}: wanted a model whose forward applies "
                f"it, got one that does not: which logits are meant is not known here"
            )
        return float(value)

    softcap = next(filter(None, map(number, SOFTCAPS)), None)
    scale = math.prod(number(key) or 1.0 for key in FACTORS)
    if (scaling := number("logits_scaling")) is not None:
        scale *= scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    for key, value in config.to_dict().items():
        known = key in (*SOFTCAPS, *FACTORS, "logits_scaling") or value in (None, False, 1.0)
        if not known and OF_LOGITS.match(key):
            raise ValueError(
                f"configuration of {type(model).__name__}: {key}={value!r} changes the logits in "
                f"a way that is not known here"
            )
    return scale, softcap


def _forward_reads(model: Any, key: str) -> bool:
    """Whether the model's own forward does: Aya Vision's and PaliGemma's, say, do not."""
    forwards = (kind.__dict__["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    return any(re.search(rf"\b{key}\b", inspect.getsource(forward)) for forward in forwards)

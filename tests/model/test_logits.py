"""Which models' logits are more than the product of their head: known, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recap_fast import linear_logprobs
from recap_fast.model.errors import ModelError
from recap_fast.model.policy import head_of

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | more)).eval()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "attention_window_size": 8, "lru_width": 32}),
    ],
)
def test_the_head_gives_the_models_own_logits(kind: str, more: dict[str, Any]) -> None:
    model = tiny(kind, **more)
    ids = torch.randint(3, 97, (1, 9))
    head = head_of(model)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        own = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
        found, _ = linear_logprobs(
            hidden[:-1], head.weight, ids[0, 1:], bias=head.bias, logit_softcap=head.softcap
        )
    torch.testing.assert_close(
        found, own[:-1].gather(1, ids[0, 1:, None])[:, 0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("cohere2", {"logit_scale": 0.3}, r"multiplied, by 0\.3"),
        ("granite", {"logits_scaling": 4.0}, r"multiplied, by 0\.25"),
        ("bert", {"is_decoder": True}, "beside its backbone and its head, got 'cls'"),
    ],
)
def test_what_the_operations_would_leave_out_is_refused(
    kind: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        head_of(tiny(kind, **more))

"""Our head inside TRL's call, held against TRL's own field by field."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from recap_fast.integrations.trl_head import completion_columns, use_recap_fast_head
from tests.no_sync import ForbidHostSync
from tests.processes import run_ranks
from tests.tiny import VISION_TOKENS, image_tokens, tiny_image, tiny_vision_model

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
VOCAB, ROWS, LENGTH, PROMPT = 97, 3, 11, 4
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                  "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "attention_window_size": 8, "lru_width": 32},
    "qwen3_moe": _EXPERTS,
    "mixtral": _EXPERTS,
    "gpt_oss": _EXPERTS,
}  # fmt: skip
UNKNOWN_TO_TRL = {"recurrent_gemma"}
"""Whose logits_soft_cap TRL's head does not read."""


def tiny(architecture: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **_TEXT | ARCHITECTURES[architecture] | more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, 8:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def fused(model: Any, batch: dict[str, Tensor], **more: Any) -> FusedCausalLMOutput:
    return model(**batch, fused_lm_head=True, **more)


def backward(output: FusedCausalLMOutput) -> None:
    assert output.log_probs is not None
    assert output.entropy is not None
    assert output.loss is not None
    ramp = torch.linspace(-0.5, 1.5, output.log_probs.numel()).view_as(output.log_probs)
    (output.loss + (ramp * output.log_probs).sum() + 0.3 * output.entropy.square().sum()).backward()


def assert_same_fields(
    ours: FusedCausalLMOutput, theirs: FusedCausalLMOutput, tolerance: float = 2e-5
) -> None:
    for name in (*ALL, "loss", "label_mask", "aux_loss"):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (wanted is None), name
        if wanted is not None:
            assert found.dtype == wanted.dtype, name
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - UNKNOWN_TO_TRL))
def test_every_field_and_gradient_is_theirs(architecture: str, batch: dict[str, Tensor]) -> None:
    theirs, ours = tiny(architecture), tiny(architecture)
    add_fused_lm_head(theirs, temperature=0.7, outputs=ALL)
    use_recap_fast_head(ours, temperature=0.7, outputs=ALL)
    wanted, found = fused(theirs, batch), fused(ours, batch)
    assert_same_fields(found, wanted)
    backward(wanted)
    backward(found)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert gradients[name].grad is None, name
            continue
        error = (gradients[name].grad - parameter.grad).norm()
        assert error <= 1e-4 * parameter.grad.norm() + 1e-6, name


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_log_probs_are_those_of_the_models_own_logits(
    architecture: str, batch: dict[str, Tensor]
) -> None:
    model = tiny(architecture)
    use_recap_fast_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        output = fused(model, batch)
        own = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    log_p = torch.log_softmax(own.logits[:, :-1].double() / 0.7, -1)
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output.log_probs[mask].double(), picked[mask], rtol=1e-4, atol=1e-4)
    assert not output.log_probs[~mask].any()
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(output.entropy[mask].double(), entropy[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("is_top1",)])
def test_only_the_fields_asked_for_are_there(
    outputs: tuple[str, ...], batch: dict[str, Tensor]
) -> None:
    theirs, ours = tiny("llama"), tiny("llama")
    add_fused_lm_head(theirs, outputs=outputs)
    use_recap_fast_head(ours, outputs=outputs)
    assert_same_fields(fused(ours, batch), fused(theirs, batch))


@pytest.mark.parametrize("cast", [False, True])
def test_autocast_and_a_head_in_float32(cast: bool, batch: dict[str, Tensor]) -> None:
    theirs, ours = tiny("llama"), tiny("llama")
    add_fused_lm_head(theirs, cast_lm_head_to_fp32=cast, outputs=ALL)
    use_recap_fast_head(ours, cast_lm_head_to_fp32=cast, outputs=ALL)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = fused(theirs, batch), fused(ours, batch)
    # bfloat16 logits differ by the order of sums; a float32 head is exact again.
    tolerance = 2e-5 if cast else 2e-2
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=tolerance, atol=tolerance
        )
    backward(found)
    assert ours.lm_head.weight.grad.dtype == torch.float32


def test_shifted_labels_and_the_number_of_items(batch: dict[str, Tensor]) -> None:
    theirs, ours = tiny("llama"), tiny("llama")
    add_fused_lm_head(theirs)
    use_recap_fast_head(ours)
    shifted = dict(batch)
    shifted["shift_labels"] = nn.functional.pad(shifted.pop("labels"), (0, 1), value=-100)[:, 1:]
    assert_same_fields(fused(ours, shifted), fused(theirs, shifted))
    items = torch.tensor(7)
    found = fused(ours, batch, num_items_in_batch=items)
    assert_same_fields(found, fused(theirs, batch, num_items_in_batch=items))


def test_without_the_flag_the_model_is_what_it_was(batch: dict[str, Tensor]) -> None:
    plain, patched = tiny("llama"), tiny("llama")
    use_recap_fast_head(patched)
    assert torch.equal(patched(**batch).logits, plain(**batch).logits)
    assert torch.equal(patched(**batch).loss, plain(**batch).loss)
    ids = batch["input_ids"][:1, :PROMPT]
    fused(patched, batch)
    made = patched.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, plain.generate(ids, max_new_tokens=4, do_sample=False))


def test_the_answer_to_an_image_is_theirs() -> None:
    random = np.random.default_rng(0)
    images = [tiny_image(random, 2, 3), tiny_image(random, 2, 2)]
    ids = torch.full((2, 14), 7)
    for row, image in enumerate(images):
        tokens = image_tokens(image)
        ids[row, 1 : 1 + len(tokens)] = torch.tensor(tokens)
    batch = {
        "input_ids": ids,
        "pixel_values": torch.cat([image.patches for image in images]),
        "image_grid_thw": torch.tensor([image.grid for image in images]),
        "mm_token_type_ids": (ids == VISION_TOKENS["image_token_id"]).int(),
        "labels": ids.clone(),
    }
    batch["labels"][:, :10] = -100
    theirs, ours = tiny_vision_model("qwen2_5_vl"), tiny_vision_model("qwen2_5_vl")
    add_fused_lm_head(theirs, temperature=0.7, outputs=ALL)
    use_recap_fast_head(ours, temperature=0.7, outputs=ALL)
    wanted, found = fused(theirs, batch), fused(ours, batch)
    assert_same_fields(found, wanted)
    backward(wanted)
    backward(found)
    for of_theirs, of_ours in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(of_ours.grad, of_theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["adapters", "and the head"])
def test_with_adapters_only_they_get_gradients(
    saved: list[str] | None, batch: dict[str, Tensor]
) -> None:
    theirs, ours = tiny("llama"), tiny("llama")
    add_fused_lm_head(theirs, outputs=ALL)
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False
    )
    models = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        models.append(get_peft_model(model, settings))
    use_recap_fast_head(models[1], outputs=ALL)
    for model in models:
        if saved:  # the copy that is trained, and not the one that is kept
            torch.nn.init.ones_(
                model.get_base_model().lm_head.modules_to_save["default"].weight[:5]
            )
    wanted, found = (fused(model, batch) for model in models)
    assert_same_fields(found, wanted)
    reference = []
    for model in models:  # what a reference is scored with
        with torch.no_grad(), model.disable_adapter():
            reference.append(fused(model, batch))
    assert_same_fields(reference[1], reference[0])
    assert not torch.allclose(reference[1].log_probs, found.log_probs, atol=1e-3)
    backward(wanted)
    backward(found)
    for (name, of_theirs), of_ours in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        if not of_theirs.requires_grad:
            assert of_ours.grad is None, name
        else:
            torch.testing.assert_close(of_ours.grad, of_theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_over_trls_own_head_and_twice(batch: dict[str, Tensor]) -> None:
    model = tiny("llama")
    add_fused_lm_head(model, temperature=2.0)
    use_recap_fast_head(model, temperature=3.0)
    use_recap_fast_head(model, temperature=0.7, outputs=ALL)
    wanted = tiny("llama")
    add_fused_lm_head(wanted, temperature=0.7, outputs=ALL)
    assert_same_fields(fused(model, batch), fused(wanted, batch))
    assert model(batch["input_ids"]).logits.shape == (ROWS, LENGTH, VOCAB)


def test_a_copy_of_the_model_scores_with_its_own_head(batch: dict[str, Tensor]) -> None:
    model = tiny("llama")
    use_recap_fast_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert not torch.allclose(fused(other, batch).log_probs, fused(model, batch).log_probs)


@pytest.mark.parametrize("columns", [LENGTH - PROMPT, LENGTH, 100])
def test_only_the_last_columns_are_scored(columns: int, batch: dict[str, Tensor]) -> None:
    model = tiny("llama")
    use_recap_fast_head(model, outputs=ALL)
    with completion_columns(columns):
        narrowed = fused(model, batch)
    assert_same_fields(narrowed, fused(model, batch), tolerance=1e-6)


def test_where_indexing_by_a_mask_would_wait_all_positions_are_scored(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    use_recap_fast_head(model, outputs=ALL)
    wanted = fused(model, batch)
    # What a GPU does: no row is chosen, so that nothing of the batch is read on the host.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "nonzero", None)
    found = fused(model, batch)
    assert_same_fields(found, wanted, tolerance=1e-6)
    backward(found)
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    monkeypatch.undo()
    backward(fused(model, batch))
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-5, atol=1e-6)


def _hidden_states(input_ids: Tensor, **_: Any) -> BaseModelOutput:
    """A backbone's, and none of what a real one asks of the device (transformers' masks wait)."""
    hidden = torch.zeros(*input_ids.shape, 32, device=input_ids.device, requires_grad=True)
    return BaseModelOutput(last_hidden_state=hidden)


def test_nothing_from_the_hidden_states_to_the_gradients_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # "meta" has no autocast to turn off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = tiny("llama").to("meta")
    use_recap_fast_head(model, outputs=ALL)
    model.model.forward = _hidden_states
    batch = {
        name: torch.zeros(ROWS, LENGTH, dtype=torch.int64, device="meta")
        for name in ("input_ids", "labels")
    }
    with ForbidHostSync("meta"), completion_columns(4):
        output = fused(model, batch)
        (output.loss + output.entropy.sum()).backward()
    assert output.log_probs.shape == (ROWS, LENGTH - 1)
    assert model.lm_head.weight.grad is not None


def test_a_batch_without_labels_gives_a_differentiable_zero(batch: dict[str, Tensor]) -> None:
    model = tiny("llama")
    use_recap_fast_head(model, outputs=("log_probs", "entropy"))
    batch["labels"].fill_(-100)
    output = fused(model, batch)
    assert output.loss.item() == 0
    (output.loss + output.entropy.sum()).backward()
    assert not model.lm_head.weight.grad.any()
    assert not model.model.embed_tokens.weight.grad.any()


@pytest.mark.slow
def test_under_fsdp_a_head_of_its_own_gets_the_gradient_of_one_process(tmp_path: Path) -> None:
    script = Path(__file__).with_name("fsdp_head.py")
    for rank in run_ranks(script, 2, tmp_path):
        errors = rank["errors"]
        ours = [max(error.values()) for name, error in errors.items() if name.startswith("ours")]
        assert len(ours) == 3
        assert max(ours) < 5e-6
        # What a drop-in must not inherit: each rank keeps the gradient of its own tokens.
        assert errors["theirs, tied=False, own_unit=True"]["lm_head.weight"] > 0.1


class _Quantised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).round()


def test_what_is_not_supported_is_refused_by_name() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="got 'entropies'"):
        use_recap_fast_head(model, outputs=("entropies",))
    with pytest.raises(ValueError, match="wanted a tuple of names, got the string 'entropy'"):
        use_recap_fast_head(model, outputs="entropy")  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, math.nan, "1"):
        with pytest.raises(ValueError, match="temperature must be"):
            use_recap_fast_head(model, temperature)  # type: ignore[arg-type]
    for headless, name in ((model.lm_head, "Linear"), (model.model, "LlamaModel")):
        with pytest.raises(ValueError, match=f"with a language-model head, .* got {name}"):
            use_recap_fast_head(headless)
    model.lm_head = _Quantised(32, VOCAB, bias=False)
    with pytest.raises(ValueError, match="head of LlamaForCausalLM: .* got .*_Quantised"):
        use_recap_fast_head(model)
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"got peft\..*\(LoRA on the head"):
        use_recap_fast_head(adapted)
    with pytest.raises(ValueError, match="logit_scale of cohere2: wanted a number > 0, got -1"):
        use_recap_fast_head(tiny("cohere2", logit_scale=-1.0))
    odd = tiny("llama")
    odd.config.final_logit_multiplier = 3.0
    with pytest.raises(ValueError, match=r"final_logit_multiplier=3\.0 changes the logits"):
        use_recap_fast_head(odd)
    scored = tiny("llama")
    use_recap_fast_head(scored)
    with pytest.raises(ValueError, match="wanted labels"):
        scored(torch.ones(1, 3, dtype=torch.int64), fused_lm_head=True)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("bert", {"is_decoder": True}, "got 'cls', which may stand between the two"),
        ("modernbert-decoder", {}, "got 'lm_head', which may stand between the two"),
        ("llama4_text", {"num_hidden_layers": 1}, "wanted a model with its backbone in base_model"),
        ("mpt", {"logit_scale": 0.5}, r"logit_scale=0\.5 of MptForCausalLM: .* applies it"),
    ],
)
def test_logits_that_are_not_the_heads_alone_are_refused(
    architecture: str, options: dict[str, Any], message: str, batch: dict[str, Tensor]
) -> None:
    """TRL's head takes these models, and gives other log-probs than theirs, or fails later."""
    config = AutoConfig.for_model(architecture, **_TEXT | {"n_heads": 4, "d_model": 32} | options)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        use_recap_fast_head(model)

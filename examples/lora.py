"""GRPO on LoRA adapters (peft), with the fused head and two rewards weighted by RECAP.

The model answers small sums. Only the adapters learn: the head is frozen, so that no gradient of
[V, H] is made for it, and logits of [tokens, V] exist neither in forward nor in backward.

    pip install peft
    python examples/lora.py              # SmolLM2-135M-Instruct, about a minute on two cores
    python examples/lora.py MODEL        # any causal LM of transformers
"""

import random
import re
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from recap_fast import PolicyLossConfig, fused_linear_policy_loss, make_reweighter
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import head_of

OBJECTIVES = ("accuracy", "digits")
GROUP = 8  # rollouts of a prompt


def rewards_of(completion, answer):
    """Whether the first number is the answer, and the share of characters that are digits."""
    numbers = re.findall(r"\d+", completion)
    text = completion.strip()
    digits = sum(character.isdigit() for character in text) / max(1, len(text))
    return [float(numbers[:1] == [str(answer)]), digits]


def roll_out(model, tokenizer, num_prompts, max_new_tokens):
    """Sequences [S, L] with left-padded prompts, their mask, targets and rewards [S, K]."""
    sums = [(random.randint(1, 9), random.randint(1, 9)) for _ in range(num_prompts)]
    texts = [f"Question: What is {a} plus {b}?\nAnswer:" for a, b in sums]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    prompts = prompts.to(model.device)
    model.eval()
    ids = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        do_sample=True,
        top_k=0,  # sample from the policy that is trained
        num_return_sequences=GROUP,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train()
    completions = ids[:, prompts.input_ids.shape[1] :]
    # Up to the first end of sequence, itself included.
    is_end = completions == tokenizer.eos_token_id
    is_kept = is_end.cumsum(1) - is_end.long() == 0
    mask = torch.cat([prompts.attention_mask.repeat_interleave(GROUP, 0), is_kept.long()], dim=1)
    targets = torch.full_like(ids, -100)  # [S, L]: what the token at each place predicts
    targets[:, -completions.shape[1] - 1 : -1] = completions.where(is_kept, -100)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = [rewards_of(text, sum(sums[row // GROUP])) for row, text in enumerate(texts)]
    return ids, mask, targets, torch.tensor(rewards, device=ids.device)


def policy_loss(model, ids, mask, targets, rewards, weights):
    """The loss of one batch, from the backbone's hidden states and the frozen head."""
    base = model.get_base_model()
    head = head_of(base)  # refuses LoRA on the head itself: it shows the weight below its adapter
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = base.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions
    ).last_hidden_state
    sequences, length = ids.shape
    rows = torch.arange(sequences, device=ids.device)
    return fused_linear_policy_loss(
        hidden.flatten(0, 1),
        head.weight,
        targets.flatten(),
        bias=head.bias,
        sequence_ids=rows.repeat_interleave(length),
        rewards=rewards,
        group_ids=rows // GROUP,
        objective_weights=weights,
        config=PolicyLossConfig(logit_softcap=head.softcap),
    )


def main(path="smollm2-135m-instruct", steps=12, num_prompts=4, max_new_tokens=6):
    torch.manual_seed(0)
    random.seed(0)
    path = resolve_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-4)
    reweighter = make_reweighter("recap", len(OBJECTIVES), window=2, signals="reward")
    for step in range(1, steps + 1):
        ids, mask, targets, rewards = roll_out(model, tokenizer, num_prompts, max_new_tokens)
        weights = reweighter.update(rewards.mean(0))
        output = policy_loss(model, ids, mask, targets, rewards, weights)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = zip(OBJECTIVES, rewards.mean(0).tolist(), weights.tolist(), strict=True)
        print(f"step {step:2}", *(f"  {n} {r:.3f} (weight {w:.2f})" for n, r, w in shown))
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])

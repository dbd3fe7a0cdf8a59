"""Two data sources in a Hugging Face Trainer, reweighted by RECAP, without ever holding the logits.

Each row says which source it is from, and the mean next-token loss of each source is an objective.
Three things are worth copying:
- The loss is made inside the model's forward, where DDP and FSDP have the head's weight at hand.
- Each objective is divided by its tokens in the whole step, over micro-batches and processes.
- The reweighter sees those means, once a step; lambda of a step follows from the steps before it.

    pip install accelerate reasoning-gym
    python examples/hf_trainer.py                                    # SmolLM2-135M, two minutes
    torchrun --nproc-per-node 2 examples/hf_trainer.py MODEL         # any causal LM of transformers
"""

import json
import sys
from pathlib import Path

import reasoning_gym
import torch
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from recap_fast import PolicyLossConfig, fused_linear_policy_loss, make_reweighter
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import head_of

SOURCES = ("sums", "reversal")


def add_fused_loss(model, num_objectives):
    """Give the model's forward the loss of labelled rows; without labels it stays as it was.

    It takes `source` [rows], the objective of each row, beside lambda [K], the token counts [K]
    and a float16 loss scaler's factor [].
    """
    head_of(model)  # refuses a head that the loss would not be right for
    plain = model.forward

    def forward(
        input_ids,
        attention_mask=None,
        labels=None,
        source=None,
        weights=None,
        counts=None,
        scale=None,
        **rest,
    ):
        if labels is None:
            return plain(input_ids=input_ids, attention_mask=attention_mask, **rest)
        decoder, head = model.get_decoder(), head_of(model)
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows, length = labels.shape
        output = fused_linear_policy_loss(
            hidden.flatten(0, 1),
            head.weight,
            pad(labels[:, 1:], (0, 1), value=-100).flatten(),
            bias=head.bias,
            sequence_ids=torch.arange(rows, device=labels.device).repeat_interleave(length),
            token_objectives=source.repeat_interleave(length),
            advantages=torch.zeros(rows, num_objectives, device=labels.device),  # no RL tokens
            objective_weights=weights,
            denominators=counts,
            loss_scale=scale,
            config=PolicyLossConfig(logit_softcap=head.softcap),
        )
        return {"loss": output.loss, "objective_losses": output.objective_losses}

    model.forward = forward


class RecapCallback(TrainerCallback):
    """Hands each step's losses to the reweighter. They are summed on the device, without a sync."""

    def __init__(self, reweighter, accelerator):
        self.reweighter, self.accelerator = reweighter, accelerator
        self.losses = torch.zeros(reweighter.num_objectives, device=reweighter.device)
        self.counts = torch.zeros_like(self.losses)

    def on_step_begin(self, args, state, control, **kwargs):
        self.losses.zero_()

    def on_step_end(self, args, state, control, **kwargs):
        self.losses = self.accelerator.reduce(self.losses, "sum")
        self.reweighter.update(self.losses, present=self.counts > 0)


class RecapTrainer(Trainer):
    def __init__(self, *args, reweighting, objectives, **kwargs):
        super().__init__(*args, **kwargs)
        self.objectives = objectives
        reweighter = make_reweighter(
            "recap", len(objectives), device=self.args.device, **reweighting
        )
        self.recap = RecapCallback(reweighter, self.accelerator)
        self.add_callback(self.recap)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The step's micro-batches, with the targets [K] of all of them over all processes where
        the Trainer counts them in one number."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(self.objectives), device=device)
        for batch in batches:
            targets = (batch["labels"][:, 1:] != -100).sum(1).to(device, torch.float32)
            counts.index_add_(0, batch["source"].to(device), targets)
        self.recap.counts = self.accelerator.reduce(counts, "sum")
        return batches, self.recap.counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # evaluation: each batch by itself, unweighted
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        weights, scaler = self.recap.reweighter.weights.clone(), self.accelerator.scaler
        scale = None if scaler is None else scaler.scale(torch.ones((), device=weights.device))
        outputs = model(**inputs, weights=weights, counts=num_items_in_batch, scale=scale)
        self.recap.losses += outputs["objective_losses"]
        # DDP and FSDP average gradients over processes; the counts are already those of all.
        return outputs["loss"] * self.accelerator.num_processes

    def log(self, logs, start_time=None):
        if "loss" in logs:
            for k, name in enumerate(self.objectives):
                logs[f"loss/{name}"] = self.recap.losses[k].item()
                logs[f"weight/{name}"] = self.recap.reweighter.weights[k].item()
        super().log(logs, start_time)


def make_rows(tokenizer, size=600):
    """Rows of both sources in turn: worked sums, and words to be spelt backwards."""
    lines = (Path(__file__).parent / "worked_sums.jsonl").read_text().splitlines()
    words = reasoning_gym.create_dataset("spell_backward", size=size, seed=0, max_word_len=6)
    rows = []
    for pair in zip(map(json.loads, lines), words, strict=False):
        for source, row in enumerate(pair):
            prompt = tokenizer(row["question"] + "\n", add_special_tokens=False).input_ids
            answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
            answer = [*answer, tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels, "source": source})
    return rows


def make_trainer(path, output, **arguments):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    add_fused_loss(model, len(SOURCES))
    return RecapTrainer(
        model,
        TrainingArguments(output, report_to="none", save_strategy="no", **arguments),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=make_rows(tokenizer),
        objectives=SOURCES,
        reweighting={"window": 2},
    )


def main(model="smollm2-135m-instruct", output="runs/hf-trainer"):
    trainer = make_trainer(
        resolve_model(model),
        output,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-5,
        logging_steps=2,
        disable_tqdm=True,
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])

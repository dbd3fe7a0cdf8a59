"""A small word-level tokenizer with a ChatML template, built without files or network."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
_SPECIAL = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "</s>"]


def tiny_tokenizer(
    chat_template: str | None = CHATML, adds_bos: bool = False, end: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """One token per ASCII character and per special token."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, **{"unk_token": "<unk>"}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": end}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "</s>"],
        **special,
    )
    tokenizer.chat_template = chat_template
    return tokenizer

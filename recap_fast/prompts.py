"""Prompt templates, and the token ids of prompts and supervised rows.

A row's question is put into a prompt template (the paper's, or the user's own), becomes the user's
turn of a conversation, and is rendered by the tokenizer's chat template. Rendering and tokenising
are done once each: chat templates write their own BOS, so the tokenizer adds none.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""

TEMPLATES: dict[str, str] = {
    "plain": "{question}",
    "thinking": (
        "{question} Output the thinking process in <think> </think> and final answer in "
        "<answer> </answer> tags."
    ),
    "answer": "{question} Output the answer in <answer> </answer> tags.",
    "box": (
        "{question} The output answer format should be as follows: "
        "<answer>[x1, y1, x2, y2]</answer>"
    ),
}
"""The paper's prompts (arXiv 2510.21978, experimental set-up). Perception sources use "answer" or
"box": forced to think on them, a model drops its thoughts altogether."""

_PROBE = "recap-fast-probe"  # stands for an assistant's turn when a chat template is looked into


def resolve_template(name_or_text: str) -> str:
    """The text of a template, given its name in `TEMPLATES` or a text that has {question} in it.

    Raises:
        ValueError: neither; the message names the nearest template.
    """
    if name_or_text in TEMPLATES:
        return TEMPLATES[name_or_text]
    if "{question}" in name_or_text:
        return name_or_text
    nearest = difflib.get_close_matches(name_or_text, TEMPLATES, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; names are {', '.join(TEMPLATES)}"
    raise ValueError(
        f"prompt must be a template's name or a text with {{question}} in it, got "
        f"{name_or_text!r}{hint}"
    )


def fill(template: str, **values: str) -> str:
    """Puts values into a template. Other braces stay as they are: LaTeX and JSON are full of
    them, which rules out `str.format`."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


class ChatRenderer:
    """Turns conversations into token ids with one tokenizer.

    A tokenizer without a chat template (a base model's) gets a plain format: the messages'
    contents, each followed by a newline, then the target and the tokenizer's EOS.

    Args:
        tokenizer: a transformers tokenizer.
        enable_thinking: passed to the chat template if it knows that name; None leaves it out.

    Raises:
        ValueError: the chat template cannot render a conversation, or a supervised row would have
            no end because the tokenizer has neither a chat template nor an EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        self._options: dict[str, Any] = {}
        known = self._has_template and "enable_thinking" in tokenizer.get_chat_template()
        if known and enable_thinking is not None:
            self._options["enable_thinking"] = enable_thinking
        # Only the plain format needs it: chat templates write BOS themselves. Asked of the
        # tokenizer itself, because having a BOS token does not mean that it is used.
        starts_with_bos = self._encode("a", special=True)[:1] == [tokenizer.bos_token_id]
        self._bos = [tokenizer.bos_token_id] if starts_with_bos and not self._has_template else []

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to the point where the assistant's turn begins."""
        return self._bos + self._encode(self._prompt_text(messages))

    def supervised(self, messages: Sequence[Message], target: str) -> tuple[list[int], int]:
        """Token ids of a conversation with the assistant's answer, and how many of them are prompt.

        The first of them are exactly those of `prompt(messages)`. The rest are the target as the
        chat template writes an assistant's turn, up to and including the token that ends the turn
        (not the newline that many templates put after it: a model that samples stops before it).
        """
        prompt_text = self._prompt_text(messages)
        answer_text = self._answer_text(messages, prompt_text, target)
        prompt_ids = self._encode(prompt_text)
        token_ids = self._encode(prompt_text + answer_text)
        if token_ids[: len(prompt_ids)] != prompt_ids:
            # A merge across the border. Sampling sees the prompt's own tokens, so these stay.
            token_ids = prompt_ids + self._encode(answer_text)
        end = [] if self._turn_end(messages).strip() else [self._eos_token_id()]
        return self._bos + token_ids + end, len(self._bos) + len(prompt_ids)

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        if self._has_template:
            return self._render(messages, add_generation_prompt=True)
        return "".join(message["content"] + "\n" for message in messages)

    def _answer_text(self, messages: Sequence[Message], prompt_text: str, target: str) -> str:
        """The assistant's turn without what opens it, cut after the mark that ends the turn."""
        turn_end = self._turn_end(messages)
        if not self._has_template:
            return target
        turn = {"role": "assistant", "content": target}
        whole = self._render([*messages, turn], add_generation_prompt=False)
        if whole.startswith(prompt_text):
            body = whole[len(prompt_text) :].removesuffix(turn_end)
        else:
            # Some templates open the turn differently when they ask for it (a "<think>" that they
            # leave out of finished turns). Then the target follows what sampling would see.
            body = target
        return body + turn_end.rstrip()

    def _turn_end(self, messages: Sequence[Message]) -> str:
        """What the chat template writes after an assistant's content."""
        if not self._has_template:
            return ""
        turn = {"role": "assistant", "content": _PROBE}
        return self._render([*messages, turn], add_generation_prompt=False).rpartition(_PROBE)[2]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._options,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of {roles}: {error}"
            ) from error
        return str(text)

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _eos_token_id(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise ValueError("supervised rows need an end, but the tokenizer has no EOS token")
        return int(self._tokenizer.eos_token_id)

"""Prompt templates, and the token ids of prompts and supervised rows.

A row's question is put into a prompt template (the paper's, or the user's own), becomes the user's
turn of a conversation, and is rendered by the tokenizer's chat template. Rendering and tokenising
are done once each: chat templates write their own BOS, so the tokenizer adds none.

Images are rendered as one placeholder each, and that one image token is then repeated as often as
the image has tokens.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_fast.model.chat_template import MEDIA, TurnEnd, find_turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recap_fast.data.images import VisionTokens

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...}. The content is a text, or a list of
{"type": "text", "text": ...} and {"type": "image"} where `place_images` has been at work."""

IMAGE_MARKER = "<image>"
"""Where an image stands in a question, in the convention of LLaVA's data."""

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

_TAG = r"(?P<tag>[<\[◁](?P<name>[\w:-]*(?:think|thought|reason)[\w:-]*)[>\]▷])\s*"
_OPENED_THOUGHT = re.compile(_TAG + r"\Z", re.IGNORECASE)
_EMPTY_THOUGHT = re.compile(_TAG + r"[<\[◁]/(?P=name)[>\]▷]\s*", re.IGNORECASE)
_ENDS_WITH_EMPTY_THOUGHT = re.compile(_EMPTY_THOUGHT.pattern + r"\Z", re.IGNORECASE)
_LAST_TOKENS = 16  # enough for a tag and what surrounds it, spelt letter by letter


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


def count_markers(messages: Sequence[Message]) -> int:
    """How many `IMAGE_MARKER`s the user's turns have."""
    return sum(m["content"].count(IMAGE_MARKER) for m in messages if m["role"] == "user")


def place_images(messages: Sequence[Message], num_images: int) -> list[Message]:
    """Turns texts with markers into lists of texts and images.

    Without markers, all images stand in front of the first user's turn. Newlines next to an image
    are dropped, as the models' own templates write none.

    Args:
        messages: whose contents are texts, with as many markers as images or none.
    """
    if not num_images:
        return list(messages)
    leading = 0 if count_markers(messages) else num_images
    placed: list[Message] = []
    for message in messages:
        text = message["content"]
        if message["role"] == "user" and (leading or IMAGE_MARKER in text):
            content = [{"type": "image"}] * leading + _split_at_markers(text)
            message, leading = {**message, "content": content}, 0
        placed.append(message)
    return placed


def _split_at_markers(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARKER)):
        if number:
            parts.append({"type": "image"})
        piece = piece.strip("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


class ChatRenderer:
    """Turns conversations into token ids with one tokenizer.

    A tokenizer without a chat template (a base model's) gets a plain format: the messages'
    contents, each followed by a newline, then the target and the tokenizer's EOS.

    Args:
        tokenizer: a transformers tokenizer.
        enable_thinking: passed to the chat template if it knows that name; None leaves it out.
        vision: the tokens that stand for images; None for a text model.

    Raises:
        ValueError: the chat template cannot render a conversation, or a supervised row would have
            no end because the tokenizer has neither a chat template nor an EOS token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        enable_thinking: bool | None = None,
        vision: VisionTokens | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vision = vision
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        self._options: dict[str, Any] = {}
        known = self._has_template and "enable_thinking" in tokenizer.get_chat_template()
        if known and enable_thinking is not None:
            self._options["enable_thinking"] = enable_thinking
        ids = vision.ids if vision else ()
        named = [getattr(tokenizer, f"{kind}_token", None) for kind in MEDIA]
        tokens = [*map(tokenizer.convert_ids_to_tokens, ids), *named]
        self._media_tokens = [str(token) for token in tokens if token]
        # Only the plain format needs it: chat templates write BOS themselves. Asked of the
        # tokenizer itself, because having a BOS token does not mean that it is used.
        starts_with_bos = self._encode("a", special=True)[:1] == [tokenizer.bos_token_id]
        self._bos = [tokenizer.bos_token_id] if starts_with_bos and not self._has_template else []

    def vision_token_in(self, text: str) -> str | None:
        """A token of images that a text spells out, which would pass for the token itself."""
        return next((token for token in self._media_tokens if token in text), None)

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends with <think>, so that completions begin inside of the thought."""
        opened = _OPENED_THOUGHT.search(self._tokenizer.decode(prompt_ids[-_LAST_TOKENS:]))
        return opened is not None and opened["tag"] == "<think>"

    def prompt(self, messages: Sequence[Message], image_tokens: Sequence[int] = ()) -> list[int]:
        """Token ids of a conversation up to the point where the assistant's turn begins.

        Args:
            image_tokens: how many tokens each image has, in the order of the images.
        """
        return self._bos + self._expand(self._encode(self._prompt_text(messages)), image_tokens)

    def supervised(
        self, messages: Sequence[Message], target: str, image_tokens: Sequence[int] = ()
    ) -> tuple[list[int], int]:
        """Token ids of a conversation with the assistant's answer, and how many of them are prompt.

        The first of them are exactly those of `prompt(messages)`. The rest are the target as the
        chat template writes an assistant's turn, up to and including the token that ends the turn
        (not what many templates put after it: a model that samples stops before it). A target
        has an end in any case: the tokenizer's EOS where the template writes no such token.

        A thought is opened and closed once: where the prompt opens it, the target goes on inside of
        it, and a target without a thought closes it first.

        Raises:
            ValueError: the prompt closes an empty thought (`enable_thinking`), and the target has
                a thought of its own.
        """
        prompt_text = self._prompt_text(messages)
        turn_end = self._turn_end(messages)
        answer_text = self._body(messages, prompt_text, target, turn_end) + turn_end.mark.rstrip()
        prompt_ids = self._encode(prompt_text)
        token_ids = self._encode(prompt_text + answer_text)
        if token_ids[: len(prompt_ids)] != prompt_ids:
            # A merge across the border. Sampling sees the prompt's own tokens, so these stay.
            token_ids = prompt_ids + self._encode(answer_text)
        end = [self._eos_token_id()] if turn_end.token_id is None else []
        prompt = self._bos + self._expand(prompt_ids, image_tokens)
        return prompt + token_ids[len(prompt_ids) :] + end, len(prompt)

    def _expand(self, token_ids: list[int], image_tokens: Sequence[int]) -> list[int]:
        """Repeats the one token of each image."""
        if self._vision is None:
            return token_ids
        given = token_ids.count(self._vision.image)
        if given != len(image_tokens):
            raise ValueError(
                f"{len(image_tokens)} images became {given} image tokens: the tokenizer's chat "
                f"template must write one {self._image_token()} for each image"
            )
        repeats = iter(image_tokens)
        expanded: list[int] = []
        for token in token_ids:
            expanded += [token] * (next(repeats) if token == self._vision.image else 1)
        return expanded

    def _image_token(self, with_ends: bool = False) -> str:
        assert self._vision is not None
        ids = [self._vision.image]
        if with_ends:
            ids = [x for x in (self._vision.start, *ids, self._vision.end) if x is not None]
        return "".join(self._tokenizer.convert_ids_to_tokens(ids))

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        if self._has_template:
            return self._render(messages, add_generation_prompt=True)
        return "".join(self._plain(message["content"]) + "\n" for message in messages)

    def _plain(self, content: str | Sequence[Mapping[str, str]]) -> str:
        if isinstance(content, str):
            return content
        image = self._image_token(with_ends=True)
        return "".join(image if part["type"] == "image" else part["text"] for part in content)

    def _body(
        self, messages: Sequence[Message], prompt_text: str, target: str, turn_end: TurnEnd
    ) -> str:
        """The assistant's turn without what opens and what ends it."""
        thought = _Thought.of(prompt_text)
        target = thought.fit(target)
        if not self._has_template:
            return thought.go_on(target)
        turn = {"role": "assistant", "content": target}
        whole = self._render([*messages, turn], add_generation_prompt=False)
        body = whole[len(prompt_text) :].removesuffix(turn_end.written)
        is_whole = whole.startswith(prompt_text) and whole.endswith(turn_end.written)
        # Some templates open the turn differently when they ask for it, or leave the thoughts of
        # finished turns out. Then the target itself follows what sampling would see.
        if not is_whole or thought.essence(target) not in thought.essence(body):
            body = target
        return thought.go_on(body)

    def _turn_end(self, messages: Sequence[Message]) -> TurnEnd:
        if not self._has_template:
            return TurnEnd("", "", None)
        return find_turn_end(self._tokenizer, lambda turns: self._render(turns, False), messages)

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


class _Thought(NamedTuple):
    """What a prompt has written of the thought that a turn begins with."""

    opening: str | None  # the tag that the prompt ends with, as in "<think>"
    closing: str  # its counterpart
    space: str  # what the prompt has after the tag
    is_closed: bool  # the prompt holds an empty thought already

    @classmethod
    def of(cls, prompt: str) -> _Thought:
        if empty := _ENDS_WITH_EMPTY_THOUGHT.search(prompt):
            return cls(empty["tag"], "", "", True)
        opened = _OPENED_THOUGHT.search(prompt)
        if opened is None:
            return cls(None, "", "", False)
        tag = opened["tag"]
        return cls(tag, f"{tag[0]}/{tag[1:]}", prompt[opened.end("tag") :], False)

    def fit(self, target: str) -> str:
        """A target for a prompt that has closed an empty thought: without one of its own."""
        if not self.is_closed or self.opening is None:
            return target
        empty = _EMPTY_THOUGHT.match(target.lstrip())
        rest = target.lstrip()[empty.end() :] if empty else target
        if rest.lstrip().startswith(self.opening):
            raise ValueError(
                f"the prompt closes an empty thought ({self.opening}), and the target has another: "
                f"set data.enable_thinking to true, or take the thoughts out of the targets"
            )
        return rest

    def go_on(self, body: str) -> str:
        """The rest of a turn whose thought the prompt has opened."""
        if self.opening is None or self.is_closed:
            return body
        if body.lstrip().startswith(self.opening):
            body = body.lstrip().removeprefix(self.opening)
            body = body.lstrip() if self.space else body
        if self.closing in body:
            return body
        gap = "" if self.space.endswith("\n") else "\n"
        return f"{gap}\n{self.closing}\n\n{body.lstrip()}"

    def essence(self, text: str) -> str:
        """A text without whitespace and without the opening, for comparisons: templates write
        both as they like."""
        return "".join(text.replace(self.opening or "<think>", "", 1).split())

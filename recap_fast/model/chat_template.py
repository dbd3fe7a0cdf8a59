"""What a chat template writes after an assistant's turn, and the token that ends the turn.

Replayed rows end with that token, and rollouts stop at it: both ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[list[Mapping[str, Any]]], str]

MEDIA = ("image", "video", "audio")
"""Of what a tokenizer may name the token that stands for it: `image_token` and so on."""

_PROBE = "recap-fast-probe"  # stands for an assistant's turn when a chat template is looked into


class TurnEnd(NamedTuple):
    """How a turn ends: all that the template writes after its content, and the one token in it
    that says so."""

    written: str
    mark: str  # `written` up to and including the token; without one, `written` as it is
    token_id: int | None  # None: nothing, whitespace, or text of ordinary tokens


def find_turn_end(
    tokenizer: PreTrainedTokenizerBase, render: Render, messages: Sequence[Mapping[str, Any]]
) -> TurnEnd:
    """Looks up how a chat template ends an assistant's turn that follows `messages`.

    Args:
        render: writes a conversation out, without a generation prompt.

    Raises:
        what `render` raises for a conversation that the template refuses.
    """
    # Templates of some vision-language models write contents that are lists of parts only.
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        whole = render([*messages, {"role": "assistant", "content": content}])
        if _PROBE in whole:
            written = whole.rpartition(_PROBE)[2]
            return _read_end(tokenizer, written)
    return TurnEnd("", "", None)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which a tokenizer's chat template ends an assistant's turn.

    None where there is no chat template, where it writes no mark, and where the mark is a text of
    several ordinary tokens, of which none could stop a completion.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None

    def render(messages: list[Mapping[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    try:
        return find_turn_end(tokenizer, render, [{"role": "user", "content": "?"}]).token_id
    except Exception:  # noqa: BLE001 (a template is a program and raises anything)
        return None  # rows meet the same refusal, and are counted


def _read_end(tokenizer: PreTrainedTokenizerBase, written: str) -> TurnEnd:
    """The first special token of what ends a turn. Others may follow: the end of the text, or what
    opens the next turn. Tokens that were added without being special count where there is none."""
    ids = set(tokenizer(written, add_special_tokens=False)["input_ids"])
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i in ids}
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    for candidates in (ids & special, set(added)):
        names = {str(added.get(i, tokenizer.convert_ids_to_tokens(i))): i for i in candidates}
        found = [(written.find(name), -len(name), name) for name in names if name in written]
        if found:
            start, _, name = min(found)
            return TurnEnd(written, written[: start + len(name)], names[name])
    return TurnEnd(written, written, None)

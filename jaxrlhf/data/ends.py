"""Where answers end: which tokens stop one, and which one is taught to end it. The same in every stage.

Four files may name a token that ends answers: the tokenizer's (EOS), `config.json`, `generation_config.json`, and the
chat template, by what it writes behind an assistant's turn. They often differ. All of them stop an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PROBE = "jaxrlhf"


def end_of_turn(rendered: str, added: Mapping[int, str]) -> int | None:
    """The id of the added token that a chat template writes behind an assistant's turn.

    `rendered` is a chat that ends with an assistant's `PROBE`, `added` the added tokens' texts by id. Blanks may stand
    before the token; None where plain text comes first, or nothing.
    """
    _, answer, behind = rendered.rpartition(PROBE)
    behind = behind.lstrip()
    fitting = [(len(text), index) for index, text in added.items() if answer and text and behind.startswith(text)]
    return max(fitting)[1] if fitting else None


def union(
    files: Sequence[int], own: Sequence[int], rows: int, added: Mapping[int, str], name: str, foreign: bool
) -> tuple[tuple[int, ...], list[str]]:
    """(stop tokens, lines on what is left out): all that the model's `files` name and that are the tokenizer's `own`.

    Left out are ids without one of the model's `rows`; and where the tokenizer is `foreign` to the model and has an end
    of its own, those of the files that are none of its added tokens: ordinary text in it, or nothing.
    """
    has_own = any(token < rows for token in own)
    stops, lines = [], []
    for token in dict.fromkeys([*files, *own]):
        text = f"{added[token]} (id {token})" if token in added else f"id {token}"
        if token >= rows:
            lines.append(f"{name}: {text} is no stop token: the model has {rows} tokens")
        elif foreign and has_own and token not in own and token not in added:
            lines.append(f"{name}: {text} is a stop token of the model's files, but no added token here: left out")
        else:
            stops.append(token)
    return tuple(stops), lines


def ended(ids: list[int], stops: Sequence[int], end: int, passed: int = 0) -> list[int]:
    """An answer up to its first stop token, that included, or with `end` behind it.

    An answer of several turns has `passed` stop tokens before its last turn.
    """
    at = [i for i, token in enumerate(ids) if token in stops]
    return ids[: at[passed] + 1] if len(at) > passed else [*ids, end]


def ended_text(ids: list[int], stops: Sequence[int], end: int, tokenizer: Any) -> list[int]:
    """A whole text, of which nothing is lost, with one stop token at its end.

    Stop tokens inside may separate documents or turns. Blanks behind the last one are taken off.
    """
    last = max((i for i, token in enumerate(ids) if token in stops), default=-1)
    rest = ids[last + 1 :]
    if last >= 0 and not (rest and tokenizer.decode(rest, skip_special_tokens=False).strip()):
        return ids[: last + 1]
    return [*ids, end]

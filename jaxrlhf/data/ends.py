"""Decides which tokens end a response, and which of these tokens training appends. Every stage uses the same rules.

Four files may name an end token: the tokenizer's file (EOS), `config.json`, `generation_config.json` and the chat
template. A chat template writes an end token after an assistant turn. The four tokens often differ, and each of them
stops a response.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PROBE = "jaxrlhf"


def end_of_turn(rendered: str, added: Mapping[int, str]) -> int | None:
    """Returns the id of the added token that a chat template writes after an assistant turn.

    The template may write blanks before this token.
    `rendered` is the text of a chat whose last assistant turn is `PROBE`. `added` maps the ids of added tokens to
    their texts. Returns None if the template writes plain text or nothing after the turn.
    """
    _, probe, rest = rendered.rpartition(PROBE)
    rest = rest.lstrip()
    matches = [(len(text), index) for index, text in added.items() if probe and text and rest.startswith(text)]
    return max(matches)[1] if matches else None


def union(
    files: Sequence[int], own: Sequence[int], rows: int, added: Mapping[int, str], name: str, foreign: bool
) -> tuple[tuple[int, ...], list[str]]:
    """Returns (all stop tokens, a line for each token that is left out).

    The stop tokens are the union of the model files' tokens `files` and the tokenizer's tokens `own`. Ids that the
    model's `rows` embeddings do not cover are left out.

    `foreign` means that the tokenizer is not the model's own tokenizer. If a foreign tokenizer has an end token, an id
    of `files` is left out unless the tokenizer has an added token with this id. Without an added token, the id means
    ordinary text or nothing in this tokenizer.
    """
    has_own = any(token < rows for token in own)
    stops, lines = [], []
    for token in dict.fromkeys([*files, *own]):
        text = f"{added[token]} (id {token})" if token in added else f"id {token}"
        if token >= rows:
            lines.append(f"{name}: {text} is no stop token, because the model has only {rows} tokens")
        elif foreign and has_own and token not in own and token not in added:
            lines.append(
                f"{name}: {text} is a stop token in the model's files, but no added token of this tokenizer, so it "
                "does not stop responses"
            )
        else:
            stops.append(token)
    return tuple(stops), lines


def ended(ids: list[int], stops: Sequence[int], end: int, passed: int = 0) -> list[int]:
    """Returns the response up to its first stop token, which is included. Without a stop token, `end` is appended.

    A response may have several turns. Its first `passed` stop tokens belong to earlier turns and do not count.
    """
    at = [i for i, token in enumerate(ids) if token in stops]
    return ids[: at[passed] + 1] if len(at) > passed else [*ids, end]


def ended_text(ids: list[int], stops: Sequence[int], end: int, tokenizer: Any) -> list[int]:
    """Returns the ids of a whole text with one stop token at the end.

    If only blanks follow the last stop token, they are removed. Otherwise `end` is appended. Stop tokens inside the
    text are kept, because they may separate documents or turns.
    """
    last = max((i for i, token in enumerate(ids) if token in stops), default=-1)
    rest = ids[last + 1 :]
    if last >= 0 and not (rest and tokenizer.decode(rest, skip_special_tokens=False).strip()):
        return ids[: last + 1]
    return [*ids, end]

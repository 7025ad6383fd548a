"""Stop tokens: which tokens end a response, and which one training appends. The same rules apply in every stage.

Four files may name an end token: the tokenizer's (EOS), `config.json`, `generation_config.json`, and the chat template,
which writes an end token after an assistant turn. These tokens often differ. Each of them stops a response.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PROBE = "jaxrlhf"


def end_of_turn(rendered: str, added: Mapping[int, str]) -> int | None:
    """The id of the added token that a chat template writes after an assistant turn, possibly after blanks.

    `rendered` is a chat that ends with the assistant's `PROBE`; `added` maps added tokens' ids to their texts. None if
    the template writes plain text or nothing.
    """
    _, probe, rest = rendered.rpartition(PROBE)
    rest = rest.lstrip()
    matches = [(len(text), index) for index, text in added.items() if probe and text and rest.startswith(text)]
    return max(matches)[1] if matches else None


def union(
    files: Sequence[int], own: Sequence[int], rows: int, added: Mapping[int, str], name: str, foreign: bool
) -> tuple[tuple[int, ...], list[str]]:
    """(all stop tokens, a line for each token that is left out).

    The stop tokens are those of the model's files (`files`) and those of the tokenizer (`own`).

    Left out are ids beyond the model's `rows` embeddings. If the tokenizer is `foreign` to the model and has an end
    token, ids of the files that are not its added tokens are left out too: they are ordinary text in it, or nothing.
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
    """The response up to and including its first stop token, or with `end` appended if it has none.

    `passed` is the number of stop tokens before the last turn of a response of several turns.
    """
    at = [i for i, token in enumerate(ids) if token in stops]
    return ids[: at[passed] + 1] if len(at) > passed else [*ids, end]


def ended_text(ids: list[int], stops: Sequence[int], end: int, tokenizer: Any) -> list[int]:
    """The whole text with one stop token at its end; blanks after a last stop token are removed.

    Stop tokens inside the text, which may separate documents or turns, are kept.
    """
    last = max((i for i, token in enumerate(ids) if token in stops), default=-1)
    rest = ids[last + 1 :]
    if last >= 0 and not (rest and tokenizer.decode(rest, skip_special_tokens=False).strip()):
        return ids[: last + 1]
    return [*ids, end]

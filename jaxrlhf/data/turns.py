"""The turns of a chat: the earlier assistant turns, which training may learn, and the text between two turns.

The turns are found in the text that the chat template writes for the whole prompt. So the model learns each turn after
exactly the text that it reads in sampling.
"""

import itertools
import operator
from dataclasses import replace

from jaxrlhf.data.chats import MARK, Chat, ChatTemplate, Prompt, Rendered
from jaxrlhf.data.sources import Message
from jaxrlhf.errors import UserError

_SHOWN = 30  # characters around the place where two texts differ


def earlier_turns(template: ChatTemplate, prompt: Prompt, place: str) -> list[tuple[Rendered, Rendered]]:
    """Returns (text before the turn, text of the turn) for each assistant turn in a prompt that is a chat.

    A turn that the response continues is not an earlier turn. Raises UserError if the template writes a turn, or the
    text before it, differently when later turns follow.
    """
    if not isinstance(prompt, Chat):
        return []
    text = template.prompt_text(prompt, place)
    last = len(prompt.messages) - prompt.continued
    turns = []
    for number, message in enumerate(prompt.messages[:last]):
        if message["role"] != "assistant" or not number:
            continue
        before = template.prompt_text(replace(prompt, messages=prompt.messages[:number], continued=False), place)
        after = template.whole_text(replace(prompt, messages=prompt.messages[: number + 1], continued=False), place)
        for part in (before, after):
            if not text.startswith(part):
                raise UserError(
                    f"{place}the chat template of {template.name} writes message {number + 1} differently when later "
                    f"messages follow: {_difference(part, text)}; for such chats, set learn: last"
                )
        turns.append((Rendered(before), Rendered(after[len(before) :])))
    return turns


def text_between_turns(template: ChatTemplate, chat: Chat, messages: list[Message], place: str) -> str:
    """Returns the text that the template writes between the assistant's turn after `chat` and its next turn.

    This is the end of the turn, the new `messages`, and the start of the next turn. The turn's own text does not
    matter: its tokens stay as the policy wrote them, with the blank that some templates write before a turn. Raises
    UserError if the template writes the chat before the turn differently when later messages follow, because the tokens
    before the turn then could not stay.
    """
    before, answered = template.prompt_text(chat, place), chat.followed_by(MARK)
    after = template.prompt_text(replace(answered, messages=[*answered.messages, *messages]), place)
    begins, _, following = after.partition(MARK)
    if not begins.startswith(before) or begins[len(before) :].strip() or MARK not in after:
        raise UserError(
            f"{place}the chat template of {template.name} writes a chat differently when later messages follow: "
            f"{_difference(before + MARK, after)}; episodes of several turns need a template that keeps what it wrote"
        )
    return following


def _difference(alone: str, followed: str) -> str:
    """Says where two texts differ: the last characters that they share, and what follows in each of them."""
    shared = sum(itertools.takewhile(bool, map(operator.eq, alone, followed)))
    before = alone[max(0, shared - _SHOWN) : shared]
    alone, followed = (text[shared : shared + _SHOWN] for text in (alone, followed))
    return f"after {before!r} comes {followed!r} instead of {alone!r}"


def learned_spans(
    context: list[int], earlier: list[tuple[list[int], list[int]]], place: str, name: str
) -> tuple[tuple[int, int], ...]:
    """Returns (start, end) of each earlier turn in the ids `context` of the whole prompt.

    `earlier` holds the ids before each turn, and the ids of the turn with its stop token. Raises UserError if later
    text changes the tokens of a turn, or of the text before the turn.
    """
    spans = []
    for number, (before, turn) in enumerate(earlier, 1):
        # If the template writes no stop token after a turn, the tokenizer has appended one that is not in the context.
        for ids in ([*before, *turn], [*before, *turn[:-1]]):
            if context[: len(ids)] == ids and len(ids) > len(before):
                spans.append((len(before), len(ids)))
                break
        else:
            raise UserError(
                f"{place}the tokenizer {name} gives assistant turn {number} other tokens when later messages follow; "
                "for such chats, set learn: last"
            )
    return tuple(spans)

"""What a scorer with a tokenizer of its own reads of an answer: one text, two segments, or a chat.

The policy's tokens mean nothing to it, so answers are decoded and tokenized again.
"""

import re
from collections.abc import Sequence

import numpy as np

from jaxrlhf.config.rewards import ReadingRewardConfig
from jaxrlhf.data.chats import Chat, as_chat, content_text
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import RewardFault

Reading = tuple[str | Chat | None, str]
"""(None, text), (prompt, completion) as two segments, or (chat, completion) as a chat."""


def readings(completions: Completions, config: ReadingRewardConfig, has_chat_template: bool) -> list[Reading]:
    """One reading per answer, as `config.input` says; `has_chat_template` is of the scorer's tokenizer.

    In a text, a text prompt stands as the data gave it with the answer right behind it, and a chat's prompt is what
    its messages say, a line each, with the answer on the next, or right behind the beginning that it goes on from. A
    template puts them as it likes.
    """
    chats = completions.chats or [None] * len(completions.prompts)
    rows = zip(completions.prompts, chats, completions.texts)
    found: list[Reading] = []
    for text, chat, continuation in rows:
        begun = chat is not None and chat.begun
        # The blank belongs between prompt and answer, and only there.
        completion = continuation if begun else continuation.lstrip(" ")
        prompt = text if chat is None else "\n".join(content_text(message) for message in chat.messages)
        if reads_chat(config, chat, has_chat_template):
            found.append((as_chat(chat or text), completion))
        elif config.input == "pair":
            found.append((prompt, completion))
        elif config.input == "completion":
            found.append((None, completion))
        elif config.template is not None:
            found.append((None, spell(config.template, prompt, completion)))
        elif chat is not None and not begun:
            found.append((None, f"{prompt}\n{completion}"))
        else:
            found.append((None, prompt + continuation))
    return found


def reads_chat(config: ReadingRewardConfig, chat: Chat | None, has_chat_template: bool) -> bool:
    """Whether a prompt, a chat or (None) a text, is read through the scorer's chat template."""
    wanted = config.input == "auto" and config.template is None and chat is not None and has_chat_template
    return config.input == "chat" or wanted


def chats_read(
    prompts: Sequence[str], chats: Sequence[Chat | None], config: ReadingRewardConfig, has_chat_template: bool
) -> list[Chat]:
    """The prompts that are read through the scorer's chat template, as chats: to see beforehand that it takes them."""
    rows = zip(prompts, chats)
    return [as_chat(c or text) for text, c in rows if reads_chat(config, c, has_chat_template)]


def spell(template: str, prompt: str, completion: str) -> str:
    """The template with {prompt} and {completion} filled in; other braces stay."""
    parts = {"prompt": prompt, "completion": completion}
    return re.sub(r"\{(prompt|completion)\}", lambda found: parts[found[1]], template)


def batches(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Numbers of the rows of each batch, i64[<= size]: rows of about the same length stand together."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def finite(name: str, scores: np.ndarray) -> np.ndarray:
    """The scores f32[B]; `RewardFault` where one is none."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise RewardFault(f"reward {name} gave {scores[bad[0]]} for answer {bad[0]} of {len(scores)}")
    return scores

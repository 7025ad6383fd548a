"""The input of a scorer with its own tokenizer: one text, two segments, or a chat.

The policy's token ids mean nothing to such a scorer, so completions are decoded and tokenized again.
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
    """One reading per completion, in the form of `config.input`. `has_chat_template`: whether the scorer has one.

    In the form of one text, a completion follows a text prompt directly. A chat prompt is one line per message, and
    the completion stands on the next line, or directly behind an assistant turn that it continues. `template`
    arranges prompt and completion freely.
    """
    chats = completions.chats or [None] * len(completions.prompts)
    readings: list[Reading] = []
    for text, chat, continuation in zip(completions.prompts, chats, completions.texts):
        continues_turn = chat is not None and chat.begun
        # The blank between prompt and completion is not part of the completion itself.
        completion = continuation if continues_turn else continuation.lstrip(" ")
        prompt = text if chat is None else "\n".join(content_text(message) for message in chat.messages)
        if reads_chat(config, chat, has_chat_template):
            readings.append((as_chat(chat or text), completion))
        elif config.input == "pair":
            readings.append((prompt, completion))
        elif config.input == "completion":
            readings.append((None, completion))
        elif config.template is not None:
            readings.append((None, fill_template(config.template, prompt, completion)))
        elif chat is not None and not continues_turn:
            readings.append((None, f"{prompt}\n{completion}"))
        else:
            readings.append((None, prompt + continuation))
    return readings


def reads_chat(config: ReadingRewardConfig, chat: Chat | None, has_chat_template: bool) -> bool:
    """Whether the scorer reads a prompt through its chat template; `chat` is None for a text prompt."""
    auto = config.input == "auto" and config.template is None and chat is not None and has_chat_template
    return config.input == "chat" or auto


def chats_read(
    prompts: Sequence[str], chats: Sequence[Chat | None], config: ReadingRewardConfig, has_chat_template: bool
) -> list[Chat]:
    """The prompts that the scorer reads through its chat template, as chats, to check them before the run."""
    return [as_chat(c or text) for text, c in zip(prompts, chats) if reads_chat(config, c, has_chat_template)]


def fill_template(template: str, prompt: str, completion: str) -> str:
    """The template with {prompt} and {completion} filled in; other braces stay."""
    parts = {"prompt": prompt, "completion": completion}
    return re.sub(r"\{(prompt|completion)\}", lambda match: parts[match[1]], template)


def batches(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Row numbers of each batch, i64[<= size]; rows of similar length share a batch."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def finite(name: str, scores: np.ndarray) -> np.ndarray:
    """The scores f32[B]; raises `RewardFault` if one is not finite."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise RewardFault(f"reward {name} returned {scores[bad[0]]} for completion {bad[0]} of {len(scores)}")
    return scores

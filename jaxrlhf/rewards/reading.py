"""The input of a scorer with its own tokenizer. A scorer is a reward model or a classifier.

The input is one text, two segments or a chat. The policy's token ids have no meaning for the scorer, so completions are
decoded and tokenized again.
"""

import re
from collections.abc import Sequence

import numpy as np

from jaxrlhf.config.rewards import ReadingRewardConfig
from jaxrlhf.data.chats import Chat, ChatTemplate, as_chat, content_text
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import RewardFault

Reading = tuple[str | Chat | None, str]
"""(None, text) for one text, (prompt, completion) for two segments, or (chat, completion) for a chat."""


def readings(completions: Completions, config: ReadingRewardConfig, has_chat_template: bool) -> list[Reading]:
    """Returns one reading per completion in the form that `config.input` sets.

    If a reading is one text, the completion follows a text prompt directly. A chat prompt becomes one line per message,
    and the completion is on the next line. A completion that continues an assistant turn follows this turn directly. If
    `config.template` is set, it decides the order of prompt and completion. `has_chat_template` says whether the
    scorer's tokenizer has a chat template.
    """
    chats = completions.chats or [None] * len(completions.prompts)
    readings: list[Reading] = []
    for text, chat, continuation in zip(completions.prompts, chats, completions.texts):
        continues_turn = chat is not None and chat.continued
        # The blank between prompt and completion does not belong to the completion.
        completion = continuation if continues_turn else continuation.lstrip(" ")
        prompt = text if chat is None else "\n".join(content_text(message) for message in chat.messages)
        if _reads_chat(config, chat, has_chat_template):
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


def _reads_chat(config: ReadingRewardConfig, chat: Chat | None, has_chat_template: bool) -> bool:
    """Whether the scorer's chat template writes the reading. `chat` is None for a text prompt."""
    auto = config.input == "auto" and config.template is None and chat is not None and has_chat_template
    return config.input == "chat" or auto


def check_chats(prompts: PromptSet, config: ReadingRewardConfig, template: ChatTemplate) -> None:
    """Raises `UserError` if the scorer's chat template refuses one of the prompts that it must write."""
    for number, (text, chat) in enumerate(zip(prompts.texts, prompts.chats), 1):
        if _reads_chat(config, chat, template.exists):
            template.whole_text(as_chat(chat or text).followed_by("a"), f"prompt {number}: ")


def check_tokenizer(tokenizer: Tokenizer | None, vocab_size: int, config: ReadingRewardConfig, key_path: str) -> None:
    """Raises `UserError` unless the scorer at `config.path` has a tokenizer that fits its model."""
    if tokenizer is None:
        raise UserError(f"{key_path}.path: {config.path} has no tokenizer files; a reward model needs a tokenizer")
    if tokenizer.text_size > vocab_size:
        sizes = f"{tokenizer.text_size} tokens, but the model has only {vocab_size}"
        raise UserError(f"{key_path}.path: the tokenizer of {config.path} has {sizes}")
    if config.input == "chat" and not tokenizer.has_chat_template:
        raise UserError(
            f"{key_path}.input: chat needs a chat template, but the tokenizer of {config.path} has no chat template; "
            "set input: text"
        )


def fill_template(template: str, prompt: str, completion: str) -> str:
    """Returns the template with the texts instead of {prompt} and {completion}. Other braces are kept."""
    parts = {"prompt": prompt, "completion": completion}
    return re.sub(r"\{(prompt|completion)\}", lambda match: parts[match[1]], template)


def batches(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Returns the row numbers, i64[<= size], of each batch. Rows of similar length share a batch."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def finite(name: str, scores: np.ndarray) -> np.ndarray:
    """Returns the scores f32[B] unchanged. Raises `RewardFault` if a score is not finite."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        where = f"completion {bad[0]} of {len(scores)}"
        raise RewardFault(f"reward {name} returned {scores[bad[0]]} for {where}; a score must be finite")
    return scores

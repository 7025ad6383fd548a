"""Tokenizes the choices of `sampling.choices` and checks them, before anything is compiled."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxrlhf.config import Sampling
from jaxrlhf.data.chats import Prompt
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.distributed.mesh import put, replicated
from jaxrlhf.errors import UserError
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.config import DecoderConfig

_PAIRS = 1024  # largest number of pairs of a prompt and a choice that are tokenized, but at least one prompt
_PROMPTS = 32  # largest number of prompts after which choices are tokenized
_LARGEST = 2**30  # largest table of the trie, in bytes

ChoiceTokens = Mapping[str, Sequence[int]]  # choice -> its tokens, with the stop token
Say = Callable[[str], None]


def load_choices(
    sampling: Sampling, model: DecoderConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], say: Say
) -> Choices | None:
    """Returns the trie of `ppo.sampling.choices`; None if there are none. Raises `UserError` if one is unusable.

    `say` prints warnings.
    """
    if sampling.choices is None:
        return None
    answers, key_path = choice_tokens(sampling, model, tokenizer, prompts, "ppo.sampling.choices", say), "ppo.sampling"
    check_length(answers, sampling.max_new_tokens, f"{key_path}.max_new_tokens")
    if sampling.max_new_tokens > (length := longest(answers)):
        say(
            f"{key_path}.max_new_tokens: is {sampling.max_new_tokens}, but the longest choice has {length} tokens with "
            f"its stop token; {length} takes less time and memory"
        )
    return trie(answers, f"{key_path}.choices")


def choice_tokens(
    sampling: Sampling, model: DecoderConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], where: str, say: Say
) -> ChoiceTokens:
    """Returns the tokens of each choice. Raises `UserError` if a choice cannot be an answer.

    A choice is tokenized like a response in SFT. If its tokens depend on the prompt, those after most of the first
    prompts are used. `where` names the choices in errors and warnings.
    """
    answers = _tokenized(sampling.choices, tokenizer, prompts, where, say)
    _check(answers, sampling, model, tokenizer, where)
    return answers


def longest(answers: ChoiceTokens) -> int:
    """Returns the number of tokens of the longest choice, including the stop token."""
    return max(map(len, answers.values()))


def check_length(answers: ChoiceTokens, limit: int, key_path: str) -> None:
    """Raises `UserError` if `limit` tokens, which `key_path` sets, are too few for a choice."""
    choice = max(answers, key=lambda choice: len(answers[choice]))
    if limit < len(answers[choice]):
        raise UserError(
            f"{key_path}: is {limit}, but the choice {choice!r} has {len(answers[choice])} tokens with its stop token; "
            f"give {len(answers[choice])}"
        )


def trie(answers: ChoiceTokens, where: str) -> Choices:
    """Returns the trie of the choices. Raises `UserError` if it is too large."""
    nodes = len({tuple(answer[:n]) for answer in answers.values() for n in range(len(answer))})
    tokens = len({token for answer in answers.values() for token in answer})
    if nodes * tokens > _LARGEST:
        raise UserError(
            f"{where}: {len(answers)} choices have {nodes} distinct prefixes and {tokens} distinct tokens; their "
            f"table would take {nodes * tokens / 2**30:.1f} GiB; give fewer choices"
        )
    return Choices.of(list(answers.values()))


def prompts_of(prompts: PromptSet) -> list[Prompt]:
    """Returns the chat of each prompt, or its text if it is not a chat."""
    return [text if chat is None else chat for text, chat in zip(prompts.texts, prompts.chats)]


def on_mesh(choices: Choices | None, mesh: jax.sharding.Mesh) -> Choices | None:
    """Returns the choices with a copy on each device of the mesh."""
    return jax.tree.map(lambda leaf: put(leaf, replicated(mesh)), choices)


def _tokenized(
    choices: Sequence[str], tokenizer: Tokenizer, prompts: Sequence[Prompt], where: str, say: Say
) -> dict[str, list[int]]:
    prompts = prompts[: max(1, min(_PROMPTS, _PAIRS // len(choices)))]
    pairs = [(prompt, choice) for prompt in prompts for choice in choices]
    answers = [tuple(answer) for _, answer in tokenizer.encode_pairs(pairs)]
    by_prompt = [tuple(answers[i : i + len(choices)]) for i in range(0, len(answers), len(choices))]
    [(most, count)] = Counter(by_prompt).most_common(1)
    if count < len(by_prompt):
        other = next(of_prompt for of_prompt in by_prompt if of_prompt != most)
        choice = next(choice for choice, a, b in zip(choices, most, other) if a != b)
        say(
            f"{where}: choices such as {choice!r} have other tokens after {len(by_prompt) - count} of the first "
            f"{len(by_prompt)} prompts than after the rest; those after the rest are used; let all prompts end alike"
        )
    return {choice: list(answer) for choice, answer in zip(choices, most)}


def _check(answers: ChoiceTokens, sampling: Sampling, model: DecoderConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raises `UserError` if a choice cannot be an answer, or cannot be told apart from another one."""
    stops = model.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
    names, unknown = tokenizer.fast.convert_ids_to_tokens, tokenizer.fast.unk_token_id
    seen: dict[tuple[int, ...], str] = {}
    for choice, answer in answers.items():
        *inner, end = answer
        if end not in stops:
            raise UserError(
                f"{where}: each choice ends with {names(end)} (id {end}), which sampling.stop_tokens lacks; add it, or "
                "leave stop_tokens out"
            )
        if (fault := tokenizer.fault(answer)) is not None:
            raise UserError(f"{where}: {choice!r}: {fault}")
        if not inner or unknown in inner:
            raise UserError(f"{where}: the tokenizer has no tokens for {choice!r}; give another text")
        stop = next((token for token in stops if token in inner or (names(token) or "\0") in choice), None)
        if stop is not None:
            raise UserError(
                f"{where}: {choice!r} contains the stop token {names(stop)}, so it would end there; leave the token out"
            )
        if (other := seen.setdefault(tuple(answer), choice)) != choice:
            raise UserError(
                f"{where}: {other!r} and {choice!r} have the same tokens, so no answer can tell them apart; leave one "
                "out"
            )
    if len(ends := {answer[-1] for answer in answers.values()}) > 1:
        raise UserError(f"{where}: they end with different stop tokens, {sorted(ends)}; give texts that end alike")

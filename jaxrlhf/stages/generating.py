"""Completes prompts with the roles of a run or with one model. This is the generate command."""

import argparse
import sys
from collections.abc import Iterator

import jax

from jaxrlhf.checkpoint.compilation_cache import AUTO, cached_programs
from jaxrlhf.config import PromptsConfig, RunConfig, Sampling
from jaxrlhf.data.chats import Chat
from jaxrlhf.data.prompts import left_pad, read_prompts
from jaxrlhf.data.templates import data_of, format_of
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError, printable
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.records import Adapter
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.stages.candidates import choices_of, load_candidates, sampling_of
from jaxrlhf.stages.choices import trie
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.roles import Roles

BATCH = 32
LENGTH_STEP = 32  # prompts are padded to a multiple of this length, so that few programs are compiled


def complete_prompts(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields {"prompt", "answers": {role: text}} for each prompt. `arguments` are the options of `jaxrlhf generate`."""
    roles, config, chosen = load_candidates(arguments)
    sampling = sampling_of(arguments, config, roles)
    prompts, ids = _prompts(arguments, config, roles, sampling)
    sampling, answers = choices_of(arguments, sampling, roles, prompts, max(map(len, ids)))
    choices = None if answers is None else trie(answers, "--choices")
    program = jax.jit(rollout, compiler_options=compiler_options(roles.base))
    cache = AUTO if config is None else config.compilation_cache
    with cached_programs(cache, lambda text: print(printable(text), file=sys.stderr)):
        for start in range(0, len(prompts), BATCH):
            batch = ids[start : start + BATCH]
            if len(ids) > 1:  # fill up the last batch with its first prompt, so that all batches have one shape
                batch = batch + [batch[0]] * (BATCH - len(batch))
            key = key_for(arguments.seed, "generate", start, "rollout")
            inputs = (roles.tokenizer, batch, sampling, choices, key)
            texts = {role: _completions(program, *model, *inputs) for role, model in chosen.items()}
            for i, prompt in enumerate(prompts[start : start + BATCH]):
                shown = prompt.messages if isinstance(prompt, Chat) else prompt
                yield {"prompt": shown, "answers": {role: completions[i] for role, completions in texts.items()}}


def _completions(
    program,
    base: Decoder,
    adapter: Adapter | None,
    tokenizer: Tokenizer,
    ids: list,
    sampling: Sampling,
    choices: Choices | None,
    key: jax.Array,
) -> list[str]:
    """Returns the text of one completion for each prompt in `ids`."""
    limit = base.config.max_positions - sampling.max_new_tokens
    length = min(-(-max(map(len, ids)) // LENGTH_STEP) * LENGTH_STEP, limit)
    prompts = left_pad(ids, length, tokenizer.pad_id)
    rollout = jax.device_get(program(base, adapter, prompts, key, sampling, choices))
    responses = zip(rollout.tokens[:, length:], rollout.response_mask)
    return [tokenizer.decode(row[mask].tolist()) for row, mask in responses]


def _prompts(
    arguments: argparse.Namespace, config: RunConfig | None, roles: Roles, sampling: Sampling
) -> tuple[list, list]:
    """Returns all prompts and their token ids. Raises `UserError`, with file and line, for an invalid prompt."""
    if arguments.prompt is not None:
        prompts, places = arguments.prompt, [f"--prompt {text[:40]!r}" for text in arguments.prompt]
    else:
        settings = {} if arguments.prompt_field is None else {"prompt_field": arguments.prompt_field}
        if (data := data_of(config)) is not None:  # chats get the format of the run
            settings |= format_of(data, arguments.prompt_field)
        rows, prompts, _ = read_prompts(PromptsConfig(path=arguments.prompts, **settings))
        places = [row.where for row in rows]
    positions = roles.base.config.max_positions
    limit = positions - sampling.max_new_tokens
    if limit < 1:
        raise UserError(f"--max-new-tokens: is {sampling.max_new_tokens}, but the model has only {positions} positions")
    encoded = list(roles.tokenizer.encode_prompts(prompts, places))
    for place, ids in zip(places, encoded):
        if not len(ids):
            raise UserError(f"{place}: the prompt is empty, and the tokenizer has no BOS token; give some text")
        if (fault := roles.tokenizer.fault(ids)) is not None:
            raise UserError(f"{place}: {fault}")
        if len(ids) > limit:
            raise UserError(
                f"{place}: {len(ids)} tokens and {sampling.max_new_tokens} new tokens exceed the model's {positions} "
                f"positions; give at most {limit} prompt tokens"
            )
    return prompts, encoded

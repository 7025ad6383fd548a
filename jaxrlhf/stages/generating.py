"""Answers to prompts from a run's roles or from a model, for the generate command."""

import argparse
import sys
from collections.abc import Iterator

import jax
import pydantic

from jaxrlhf.checkpoint.compilation_cache import AUTO, kept_programs
from jaxrlhf.config import PromptsConfig, RunConfig, Sampling
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.chats import Chat
from jaxrlhf.data.prompts import left_pad, read_prompts
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.records import Adapter
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.stages.checks import check_tokens
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.roles import Roles, load_origin, load_run

BATCH = 32
LENGTH_STEP = 32  # prompts are padded to a multiple of this, so that few programs are compiled


def answer_prompts(arguments: argparse.Namespace) -> Iterator[dict]:
    """One record per prompt, in order: {"prompt", "answers": {role: text}}; see `jaxrlhf generate` for arguments."""
    config = None
    if arguments.run is not None:
        roles = load_run(arguments.run)
        config = load_config(f"{arguments.run}/config.yaml")
        chosen = _chosen_roles(roles, arguments.roles, config)
    else:
        if arguments.roles not in (None, "base"):
            raise UserError(f"--roles {arguments.roles}: a model folder has the role base only; use --run")
        base, tokenizer = load_pretrained(arguments.model)
        if tokenizer is None:
            raise UserError(f"{arguments.model}: has no tokenizer files, so there is no text in or out")
        roles = Roles(base, tokenizer)
        chosen = {"base": (base, None)}
    sampling = _sampling(arguments, config, roles)
    prompts, ids = _prompts(arguments, config, roles, sampling)
    program = jax.jit(rollout, compiler_options=compiler_options(roles.base))
    with kept_programs(AUTO if config is None else config.compilation_cache, _say):
        yield from _records(program, chosen, roles.tokenizer, prompts, ids, sampling, arguments.seed)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _records(
    program, chosen: dict, tokenizer: Tokenizer, prompts: list, ids: list, sampling: Sampling, seed: int
) -> Iterator[dict]:
    for start in range(0, len(prompts), BATCH):
        part = ids[start : start + BATCH]
        # Rows that fill up the last batch repeat its first prompt, so that it has the other batches' shape.
        part = part + [part[0]] * (BATCH - len(part) if len(ids) > 1 else 0)
        key = key_for(seed, "generate", start, "rollout")
        answers = {role: _answers(program, *model, tokenizer, part, sampling, key) for role, model in chosen.items()}
        for i, prompt in enumerate(prompts[start : start + BATCH]):
            given = prompt.messages if isinstance(prompt, Chat) else prompt
            yield {"prompt": given, "answers": {role: texts[i] for role, texts in answers.items()}}


def _answers(
    program, base: Decoder, adapter: Adapter | None, tokenizer: Tokenizer, ids: list, sampling: Sampling, key
) -> list[str]:
    """One answer to each of the prompts `ids`."""
    room = base.config.max_positions - sampling.max_new_tokens
    length = min(-(-max(map(len, ids)) // LENGTH_STEP) * LENGTH_STEP, room)
    answered = jax.device_get(program(base, adapter, left_pad(ids, length, tokenizer.pad_id), key, sampling))
    responses = zip(answered.tokens[:, length:], answered.response_mask)
    return [tokenizer.decode(row[mask].tolist()) for row, mask in responses]


def _chosen_roles(roles: Roles, wanted: str | None, config: RunConfig) -> dict[str, tuple[Decoder, Adapter | None]]:
    """The models of the roles asked for, or of the last one that was trained."""
    known: dict[str, tuple[Decoder, Adapter | None]] = {}
    retrained = config.sft_trains_base
    known["base"] = (roles.base, None)
    if retrained or "sft" in roles.adapters:
        known["sft"] = (roles.base, roles.reference)
    known |= {name: (roles.base, roles.adapters[name]) for name in ("average", "policy") if name in roles.adapters}
    names = [list(known)[-1]] if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--roles: this run has no role {name!r}; it has {', '.join(known)}")
    if retrained and "base" in names:  # SFT trained the whole model: the run's base is its result
        known["base"] = (load_origin(config), None)
    return {name: known[name] for name in names}


def _sampling(arguments: argparse.Namespace, config: RunConfig | None, roles: Roles) -> Sampling:
    run = config.ppo.sampling if config is not None and config.ppo is not None else Sampling()
    given = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        sampling = Sampling(**{**run.model_dump(), **changed, "samples_per_prompt": 1})
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {fault['msg']}, given {fault['input']}") from None
    check_tokens(roles.base.config, sampling, "ppo.sampling of the run")
    return sampling


def _prompts(
    arguments: argparse.Namespace, config: RunConfig | None, roles: Roles, sampling: Sampling
) -> tuple[list, list]:
    """All prompts, as given and as token ids; UserError, with its place, for one that cannot be answered."""
    if arguments.prompt is not None:
        prompts, places = arguments.prompt, [f"--prompt {text[:40]!r}" for text in arguments.prompt]
    else:
        given = {} if arguments.prompt_field is None else {"prompt_field": arguments.prompt_field}
        if config is not None and (stage := config.ppo or config.sft) is not None:  # chats as the run wrote them
            given |= {"tools": stage.data.tools, "chat_template_kwargs": stage.data.chat_template_kwargs}
        rows, prompts, _ = read_prompts(PromptsConfig(path=arguments.prompts, **given))
        places = [row.where for row in rows]
    positions = roles.base.config.max_positions
    room = positions - sampling.max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens: {sampling.max_new_tokens}, but the model has {positions} positions in all")
    encoded = list(roles.tokenizer.encode_prompts(prompts, places))
    for place, ids in zip(places, encoded):
        if not len(ids):
            raise UserError(f"{place}: an empty prompt, and the tokenizer has no BOS to begin with; give some text")
        if (fault := roles.tokenizer.fault(ids)) is not None:
            raise UserError(f"{place}: {fault}")
        if len(ids) > room:
            raise UserError(
                f"{place}: {len(ids)} tokens and {sampling.max_new_tokens} new ones are more than the model's "
                f"{positions} positions; want at most {room} prompt tokens"
            )
    return prompts, encoded

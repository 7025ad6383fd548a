"""Loads the models from which a command samples, and the sampling settings of the command."""

import argparse
from collections.abc import Sequence

import jax
import pydantic

from jaxrlhf.config import RunConfig, Sampling
from jaxrlhf.config.reading import load_config, parse_yaml
from jaxrlhf.data.chats import Prompt
from jaxrlhf.errors import UserError, short
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.records import Adapter
from jaxrlhf.stages.checks import check_tokens
from jaxrlhf.stages.choices import ChoiceTokens, check_length, choice_tokens, longest
from jaxrlhf.stages.roles import Roles, load_origin, load_run
from jaxrlhf.tracking.notices import notice

Model = tuple[Decoder, Adapter | None]


def load_candidates(
    arguments: argparse.Namespace, mesh: jax.sharding.Mesh | None = None, all_roles: bool = False
) -> tuple[Roles, RunConfig | None, dict[str, Model]]:
    """Returns (all roles, the config of the run or None, the chosen models by the name of their role).

    `arguments` has `run` or `model`, `step` and `roles`. Without `roles` the role trained last is chosen, or every role
    of the run if `all_roles` is true. DIR:ROLE chooses a role of another run with the same tokenizer and model sizes.
    Raises `UserError` for a folder, step or role that does not exist.
    """
    names = None if arguments.roles is None else [name.strip() for name in arguments.roles.split(",")]
    if arguments.run is not None:
        roles = load_run(arguments.run, mesh=mesh, step=arguments.step)
        config = load_config(f"{arguments.run}/config.yaml")
        if roles.checkpoint is not None:
            stage, step = roles.checkpoint
            notice(f"{arguments.run}: the roles of the stage {stage} come from its checkpoint of step {step}")
        return roles, config, _chosen_roles(roles, names, all_roles, config, mesh)
    if arguments.step is not None:
        raise UserError(f"--step {short(arguments.step)}: a model folder has no checkpoints; give --run")
    if names not in (None, ["base"]):
        raise UserError(f"--roles {arguments.roles}: a model folder has only one role, base; give --run")
    base, tokenizer = load_pretrained(arguments.model, mesh=mesh)
    if tokenizer is None:
        raise UserError(f"{arguments.model}: has no tokenizer files; give a model folder with a tokenizer")
    return Roles(base, tokenizer), None, {"base": (base, None)}


def _chosen_roles(
    roles: Roles, names: list[str] | None, all_roles: bool, config: RunConfig, mesh: jax.sharding.Mesh | None
) -> dict[str, Model]:
    """Returns (base, adapter) by role, for the roles `names`.

    If `names` is None, the role trained last is returned, or every role if `all_roles` is true.
    """
    known: dict[str, Model] = {"base": (roles.base, None)}
    if config.sft_trains_base or "sft" in roles.adapters:
        known["sft"] = (roles.base, roles.reference)
    known |= {name: (roles.base, roles.adapters[name]) for name in ("average", "policy") if name in roles.adapters}
    if names is None:
        names = [*known] if all_roles else [[*known][-1]]
    others = {name: _role_of_other(name, roles, mesh) for name in names if ":" in name}
    for name in names:
        if name not in known | others:
            scores = name in ("value", "reward")
            fault = f"the role {name} scores text and cannot write any" if scores else f"this run has no role {name!r}"
            raise UserError(f"--roles: {fault}; give roles that write text: {', '.join(known)}")
    if config.sft_trains_base and "base" in names:  # after a full fine-tune of sft the run's base is the SFT model
        known["base"] = (load_origin(config, mesh), None)
    return {name: (known | others)[name] for name in names}


def _role_of_other(name: str, roles: Roles, mesh: jax.sharding.Mesh | None) -> Model:
    """Returns the role DIR:ROLE of another run, which is sampled with the programs and tokenizer of `roles`."""
    run_dir, _, role = name.rpartition(":")
    other = load_run(run_dir, mesh=mesh)
    if other.base.config != roles.base.config or other.tokenizer.fast.get_vocab() != roles.tokenizer.fast.get_vocab():
        raise UserError(
            f"--roles {name}: the tokenizer or the model size of {run_dir} differs from that of --run; evaluate "
            f"{run_dir} alone"
        )
    return _chosen_roles(other, [role], False, load_config(f"{run_dir}/config.yaml"), mesh)[role]


def _parse_choices(text: str) -> list | None:
    """Returns the texts of `--choices`: a YAML list, or texts between commas without blanks around them."""
    if not text.strip():
        return None
    listed = text.lstrip().startswith("[")
    return parse_yaml(text, "--choices") if listed else [choice.strip() for choice in text.split(",")]


def choices_of(
    arguments: argparse.Namespace, sampling: Sampling, roles: Roles, prompts: Sequence[Prompt], prompt_tokens: int
) -> tuple[Sampling, ChoiceTokens | None]:
    """Returns (sampling settings, the tokens of each choice). Completions are as long as the longest choice.

    Without choices, the settings are unchanged. `prompt_tokens` is the number of tokens of the longest prompt.
    """
    if sampling.choices is None:
        return sampling, None
    where = "ppo.sampling.choices of the run" if arguments.choices is None else "--choices"
    answers = choice_tokens(sampling, roles.base.config, roles.tokenizer, prompts, where, notice)
    if arguments.max_new_tokens is not None:
        check_length(answers, arguments.max_new_tokens, "--max-new-tokens")
    length, positions = longest(answers), roles.base.config.max_positions
    if prompt_tokens + length > positions:
        raise UserError(
            f"{where}: a prompt has {prompt_tokens} tokens and a choice {length}, but the model has only {positions} "
            "positions; give shorter prompts or choices"
        )
    return sampling.model_copy(update={"max_new_tokens": length}), answers


def sampling_of(arguments: argparse.Namespace, config: RunConfig | None, roles: Roles) -> Sampling:
    """Returns the run's sampling settings, in which the options of the command line replace some values."""
    run = config.ppo.sampling if config is not None and config.ppo is not None else Sampling()
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.choices is not None:
        options["choices"] = _parse_choices(arguments.choices)
    try:
        sampling = Sampling(**{**run.model_dump(), **options, "samples_per_prompt": 1})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['msg'].removeprefix('Value error, ')}, not {first['input']}") from None
    check_tokens(roles.base.config, sampling, "ppo.sampling of the run")
    if sampling.choices is None:
        return sampling
    return sampling.model_copy(update={"max_new_tokens": 1})  # until `choices_of` knows the longest choice

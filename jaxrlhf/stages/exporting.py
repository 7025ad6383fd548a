"""A role of a run as a folder for other programs, for the export command."""

import argparse
from pathlib import Path

from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import load_config
from jaxrlhf.errors import UserError
from jaxrlhf.hf.folders import PEFT_INFO
from jaxrlhf.hf.peft import save_peft
from jaxrlhf.hf.peft_full import beyond_peft
from jaxrlhf.hf.weights import save_pretrained
from jaxrlhf.models.adapters import SCORE
from jaxrlhf.models.quantize import quantization
from jaxrlhf.records import Adapter
from jaxrlhf.rewards.load import parts_of
from jaxrlhf.stages.roles import ADAPTERS, Roles, load_run

DEFAULT_ROLES = {"merged": ("policy", "sft"), "peft": ("policy", "sft"), "reward": ("reward", "value")}


def export_role(arguments: argparse.Namespace) -> list[str]:
    """Writes the folder that is asked for; lines that say what was written. See `jaxrlhf export` for arguments.

    Raises `UserError`, before anything is written, where run or role is not there, the role does not suit the format,
    or the folder holds something else.
    """
    if arguments.max_shard_bytes < 1:
        raise UserError(f"--max-shard-bytes: must be at least 1, not {arguments.max_shard_bytes}")
    roles = load_run(arguments.run)
    config = load_config(f"{arguments.run}/config.yaml").model_copy(update={"run_dir": arguments.run})
    base_path, own = base_of(config)
    _check_target(arguments.to, config, base_path)
    name, adapter = _role(roles, config, arguments.role, arguments.format)
    _check_suited(name, adapter, arguments.format)
    lines = [f"{arguments.to}: {name} of {arguments.run} as {arguments.format}"]
    if arguments.format == "merged":
        save_pretrained(arguments.to, roles.base, adapter, roles.tokenizer, arguments.max_shard_bytes, arguments.dtype)
    elif arguments.format == "peft":
        save_peft(arguments.to, roles.base, adapter, base_path, arguments.dtype)
        lines.append(f"it belongs on {base_path}{', which was made in a run: give it along' if own else ''}")
        if (Path(base_path) / PEFT_INFO).is_file():
            lines.append("that is an adapter itself, merged into its base here: for PEFT, merge the two into a folder")
        if (codes := quantization(roles.base)) is not None:
            lines.append(f"it was trained on that base in {codes} codes; on plain weights it computes a little else")
    else:
        from jaxrlhf.hf.classifiers import save_sequence_classifier

        save_sequence_classifier(
            arguments.to, roles.base, adapter, roles.tokenizer, arguments.dtype, arguments.max_shard_bytes
        )
    return lines


def base_of(config: RunConfig) -> tuple[str, bool]:
    """The folder or hub id of a run's base, and whether a run made or changed it."""
    own = Path(config.run_dir, "roles", "base")
    if own.is_dir():
        return str(own.absolute()), True
    if config.model.run is not None:
        origin = load_config(f"{config.model.run}/config.yaml")
        return base_of(origin.model_copy(update={"run_dir": config.model.run}))
    path = config.model.path
    return (str(Path(path).expanduser().absolute()) if Path(path).expanduser().is_dir() else path), False


def _check_target(target: str, config: RunConfig, base_path: str) -> None:
    """`UserError` where writing would replace what the run is made of."""
    folder = Path(target).expanduser().resolve()
    origins = [base_path, config.run_dir, config.model.tokenizer]
    if config.ppo is not None:
        origins += [config.ppo.policy, config.ppo.reference]
        origins += [getattr(part, "path", None) for part in parts_of(config.ppo.reward)]
    kept = {Path(origin).expanduser().resolve() for origin in origins if origin is not None}
    if folder in kept or folder.is_relative_to(Path(config.run_dir, "roles").resolve()):
        raise UserError(f"--to {target}: is what the run was made from or is made of; give a folder of its own")


def _role(roles: Roles, config: RunConfig, wanted: str | None, format: str) -> tuple[str, Adapter | None]:
    """Name and adapter of the role asked for, or of the format's first that the run has."""
    known: dict[str, Adapter | None] = {name: roles.adapters[name] for name in ADAPTERS if name in roles.adapters}
    if config.sft_trains_base:
        known["sft"] = None  # SFT trained the whole model: its result is the base
    names = DEFAULT_ROLES[format] if wanted is None else (wanted,)
    for name in names:
        if name in known:
            return name, known[name]
    raise UserError(
        f"--role: this run has no role {' or '.join(names)}; it has {', '.join(known) or 'none'}"
        f"{' (a reward adapter is exported by --format reward)' if wanted is None and format != 'reward' else ''}"
    )


def _check_suited(name: str, adapter: Adapter | None, format: str) -> None:
    """`UserError` where the format has no place for what the role is."""
    whole = adapter is None or any(beyond_peft(path, leaves) for path, leaves in adapter.items())
    if format == "peft" and whole:
        raise UserError(f"--format peft: {name} has whole weights, not LoRA pairs; give --format merged")
    if format == "reward" and (adapter is None or SCORE not in adapter):
        raise UserError(f"--format reward: {name} has no scalar head; give --role reward, or --role value")

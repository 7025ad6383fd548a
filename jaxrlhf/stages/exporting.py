"""Exports a role of a run as a folder for other programs. This is the export command."""

import argparse
import warnings
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

DEFAULT_ROLES = {"merged": ("policy", "sft"), "peft": ("policy", "sft"), "reward": ("reward",)}


def export_role(arguments: argparse.Namespace) -> list[str]:
    """Writes the export and returns lines that describe it. `arguments` are the options of `jaxrlhf export`.

    Raises `UserError`, before anything is written, if the run or role does not exist, the format cannot represent the
    role, or the target folder contains anything but an older export.
    """
    roles = load_run(arguments.run, step=arguments.step)
    config = load_config(f"{arguments.run}/config.yaml").model_copy(update={"run_dir": arguments.run})
    base_path, own = base_of(config)
    _check_target(arguments.to, config, base_path)
    name, adapter = _role(roles, config, arguments.role, arguments.format)
    at = "" if roles.checkpoint is None else f" (checkpoint of {roles.checkpoint[0]}, step {roles.checkpoint[1]})"
    lines = [f"{arguments.to}: {name} of {arguments.run}{at} as {arguments.format}"]
    if arguments.format == "merged":
        save_pretrained(arguments.to, roles.base, adapter, roles.tokenizer, arguments.max_shard_bytes, arguments.dtype)
    elif arguments.format == "peft":
        save_peft(arguments.to, roles.base, adapter, base_path, arguments.dtype)
        lines.append(f"its base is {base_path}{'; a run made this base, so ship it with the adapter' if own else ''}")
        if (Path(base_path) / PEFT_INFO).is_file():
            lines.append(
                "that base is itself an adapter; to use the export with PEFT, first merge that adapter into its own "
                "base"
            )
        if (codes := quantization(roles.base)) is not None:
            lines.append(
                f"it was trained on that base in {codes}; its outputs differ slightly on weights that are not quantised"
            )
    else:
        from jaxrlhf.hf.classifiers import save_sequence_classifier

        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always", UserWarning)
            sizes = (arguments.dtype, arguments.max_shard_bytes)
            save_sequence_classifier(arguments.to, roles.base, adapter, roles.tokenizer, *sizes)
        lines += [str(warning.message) for warning in given if warning.category is UserWarning]
    return lines


def base_of(config: RunConfig) -> tuple[str, bool]:
    """Returns (folder or hub id of a run's base, whether a run made or changed this base)."""
    own = Path(config.run_dir, "roles", "base")
    if own.is_dir():
        return str(own.absolute()), True
    if config.model.run is not None:
        origin = load_config(f"{config.model.run}/config.yaml")
        return base_of(origin.model_copy(update={"run_dir": config.model.run}))
    path = config.model.path
    return (str(Path(path).expanduser().absolute()) if Path(path).expanduser().is_dir() else path), False


def _check_target(target: str, config: RunConfig, base_path: str) -> None:
    """Raises `UserError` if the export would replace an input or a role of the run."""
    folder = Path(target).expanduser().resolve()
    origins = [base_path, config.run_dir, config.model.tokenizer]
    if config.ppo is not None:
        origins += [config.ppo.policy, config.ppo.reference]
        origins += [getattr(part, "path", None) for part in parts_of(config.ppo.reward)]
    protected = {Path(origin).expanduser().resolve() for origin in origins if origin is not None}
    inner = [Path(config.run_dir, name).resolve() for name in ("roles", "checkpoints")]
    if folder in protected or any(folder.is_relative_to(path) for path in inner):
        raise UserError(f"--to {target}: the run was made from this folder or still needs it; give another folder")


def _role(roles: Roles, config: RunConfig, name: str | None, format: str) -> tuple[str, Adapter | None]:
    """Returns (name, adapter) of the requested role, else of the first of the format's default roles that exists.

    Raises `UserError`, with the roles that exist, if there is no such role or the format cannot represent it.
    """
    known: dict[str, Adapter | None] = {name: roles.adapters[name] for name in ADAPTERS if name in roles.adapters}
    if config.sft_trains_base:
        known["sft"] = None  # after a full fine-tune of sft the base is the SFT model
    names = DEFAULT_ROLES[format] if name is None else (name,)
    found = next((candidate for candidate in names if candidate in known), None)
    if found is None:
        fault = f"this run has no role {' or '.join(names)}; it has {', '.join(known) or 'none'}"
    else:
        fault = _fault(found, known[found], format)
    if fault is None:
        return found, known[found]
    suited = [f"--role {other}" for other, adapter in known.items() if _fault(other, adapter, format) is None]
    if format != "reward" and found is None and name is None and "reward" in known:
        suited = ["--format reward"]
    elif not suited or (format == "peft" and found is not None):
        suited = ["--format merged"] if known else ["another run"]
    option = f"--role {name}" if found is None and name is not None else f"--format {format}"
    raise UserError(f"{option}: {fault}; give {' or '.join(suited)}")


def _fault(name: str, adapter: Adapter | None, format: str) -> str | None:
    """Returns a text that says why the format cannot represent a role; None if it can."""
    full = adapter is None or any(beyond_peft(path, leaves) for path, leaves in adapter.items())
    if format == "peft" and full:
        return f"{name} has full weights, not LoRA pairs"
    if format == "reward" and (adapter is None or SCORE not in adapter):
        return f"{name} has no scalar head"
    return None

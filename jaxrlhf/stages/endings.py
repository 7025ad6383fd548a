"""The lines printed after a stage: what it reached, where its files are, and the next command.

Also the lines of a dry run.
"""

import shlex
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint.checkpoints import stored_steps
from jaxrlhf.config import RunConfig
from jaxrlhf.stages.training import planned_steps


def ending(config: RunConfig, stage: str, reached: dict[str, Any]) -> list[str]:
    """Returns the lines to print after a stage.

    `reached` holds the results that `mark_finished` recorded for the stage.
    """
    roles = {"sft": ["base" if config.sft_trains_base else "sft"], "reward_model": ["reward"]}
    names = roles.get(stage) or [name for name in ("policy", "value", "average") if _folder(config, name).is_dir()]
    folders = ", ".join(str(_folder(config, name)) for name in names)
    what = _reached(stage, reached) + _stopped(reached)
    return [f"{stage}: {what}saved in {folders}", f"{stage}: next: {next_command(config, stage)}"]


def next_command(config: RunConfig, stage: str) -> str:
    """Returns a command for the user that uses the result of a finished stage."""
    run = shlex.quote(config.run_dir)
    if stage == "reward_model":
        return f"jaxrlhf export --run {run} --role reward --format reward --to FOLDER"
    # After a full fine-tune the role sft is the run's base, and the role base is the model before SFT.
    sft = "sft" if config.sft_trains_base or _folder(config, "sft").is_dir() else "base"
    roles = [sft] if stage == "sft" else [sft, "policy"]
    return f"jaxrlhf generate --run {run} --roles {','.join(roles)} --prompt TEXT"


def planned(config: RunConfig, stage: str, inputs: Any) -> str:
    """Returns the line of `--dry-run` that says what a stage would do."""
    section = getattr(config, stage)
    if stage == "ppo":
        work = f"{section.iterations:,} iterations of {section.batch_size} prompts"
    else:
        _, work = planned_steps(section, inputs.train)
    done = max(stored_steps(Path(config.run_dir, "checkpoints", stage)), default=0)
    return f"{stage}: would run {work}{f', from step {done} on' if done else ''}"


def _folder(config: RunConfig, role: str) -> Path:
    return Path(config.run_dir, "roles", role)


def _reached(stage: str, reached: dict[str, Any]) -> str:
    """Returns the results of a stage as text that ends with "; ", or "" if the stage measured nothing."""
    if stage == "ppo":
        before, after = reached["before"], reached["after"]
        reward = f"reward {after['reward/score']:z.3f}, before PPO {before['reward/score']:z.3f}"
        return f"{reward}; KL to the reference {after['kl/k1']:z.3f} nats; "
    if stage == "reward_model":
        return f"accuracy {reached['heldout_accuracy']:z.3f} on {reached['heldout_pairs']} held-out pairs; "
    return f"held-out loss {reached['heldout_loss']:z.3f} nats per token; " if "heldout_loss" in reached else ""


def _stopped(reached: dict[str, Any]) -> str:
    """Returns a text that says at which step early stopping ended the stage.

    It ends with "; ", or is "" if all steps were done.
    """
    if (early := reached.get("stopped_early")) is None:
        return ""
    best = f", best {early['metric']} at step {early['best_step']}" if early["best"] is not None else ""
    return f"stopped early at step {early['step']} of {early['of']}{best}; "

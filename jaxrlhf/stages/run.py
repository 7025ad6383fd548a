"""A whole run: everything is read and checked first, then the stages run in order, each once.

A finished stage is not run again: the same command continues where the run stood.
"""

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.checkpoint.compilation_cache import kept_programs
from jaxrlhf.checkpoint.lock import RunLock
from jaxrlhf.checkpoint.run_dir import begun_at, check_run, make_folder, open_run, record_begin
from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import dump_config
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.jit import compiled_with
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.distributed.stopping import StopSignals
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import named_parameters, with_target
from jaxrlhf.models.fused_attention import check_device, check_model
from jaxrlhf.models.sharding import shard
from jaxrlhf.stages import reward_model, sft
from jaxrlhf.stages.checks import end_notes
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.resuming import makes_longer, may_change, told
from jaxrlhf.stages.roles import Roles, check_none_gone, finished_stages, load_roles, mark_unfinished, save_base
from jaxrlhf.tracking.metrics import MetricsLog

SHARED = "give a folder on a file system that all hosts share"


def run_stages(config: RunConfig, stop: StopSignals | None = None) -> Roles:
    """Runs the stages of `config` that have not finished yet; the roles at the end.

    Raises `UserError`, before anything is compiled or written, where settings, files, rows or model cannot
    be used, or where another run is at work in the directory. Where `stop` is asked to, `Stopped` ends the run.
    """
    # Absolute from here on: a reward function may change the working directory.
    folder, writes = Path(config.run_dir).absolute(), jax.process_index() == 0
    config = config.model_copy(update={"run_dir": str(folder)})
    run = Run(
        config,
        processes.agreed(lambda: make_mesh(config.mesh)),
        MetricsLog(folder / "metrics.jsonl" if writes else None),
        MetricsLog(folder / "samples.jsonl" if writes else None),
        stop,
    )
    with contextlib.ExitStack() as open_things:
        open_things.enter_context(compiled_with(config.compiler_options))
        lock = open_things.enter_context(RunLock(folder, writes, run.say))
        for log in run.logs.values():
            open_things.enter_context(contextlib.closing(log))
        open_things.enter_context(kept_programs(config.compilation_cache, run.say))
        return _run_stages(run, lock, writes)


def _run_stages(run: Run, lock: RunLock, writes: bool) -> Roles:
    config, folder, allowed = run.config, run.folder, may_change(run.config)
    changes = processes.agreed(lambda: check_run(folder, dump_config(config), allowed))
    begun = (folder / "config.yaml").is_file()
    if begun:
        lock.take()
    roles = processes.agreed(lambda: _load_roles(run))
    for line in end_notes(config, roles.tokenizer):
        run.say(line)
    begins = _set_clock(run, roles)
    finished = finished_stages(config.run_dir)
    again = {"ppo"} & {*finished} if any(map(makes_longer, changes)) else set()
    todo = [stage for stage in config.stages if stage not in finished or stage in again]
    for stage in config.stages:
        if stage not in todo:
            run.say(f"{stage}: has finished before")
    inputs = processes.agreed(lambda: _load_inputs(run, roles, todo))
    makes_base = config.model.new is not None and not (folder / "roles" / "base").is_dir()
    found = {"adapters": sorted(roles.adapters), "finished": sorted(finished), "base to make": makes_base}
    # Every process has then read what is there before process 0 writes more.
    processes.check_alike(f"things in run_dir {folder}", found, SHARED)
    if not processes.alone():
        processes.check_alike("data", _checksums(inputs), "give all hosts the same files of data and tokenizer")
    if not begun:
        processes.agreed(lambda: make_folder(folder))
        lock.take()
        processes.agreed(lambda: _check_not_begun(folder, writes))
    for text in map(told, changes):
        run.say(f"run_dir {folder}: {text}")
    for stage in again if writes else ():
        mark_unfinished(config.run_dir, stage)
    processes.agreed(lambda: open_run(folder, dump_config(config), writes, allowed))
    if writes:
        record_begin(folder, begins)
    processes.barrier()
    written = {"config.yaml": "present" if (folder / "config.yaml").is_file() else "absent"}
    processes.check_alike(f"things in run_dir {folder}", written, SHARED)
    if makes_base:
        save_base(config.run_dir, roles.base, roles.tokenizer)
    roles.base = shard(run.mesh, roles.base)
    train = {"sft": sft.train, "reward_model": reward_model.train, "ppo": ppo.train}
    for stage in todo:
        roles = train[stage](run, roles, inputs[stage])
    return roles


def _load_roles(run: Run) -> Roles:
    check_none_gone(run.config)
    roles = load_roles(run.config, run.mesh)
    if run.config.model.attention == "cudnn":
        check_model(roles.base.config, run.mesh.shape["tensor"])
        check_device(roles.base.config, named_parameters(roles.base)["embed_tokens/embedding"].dtype)
        roles.base = with_target(roles.base, dataclasses.replace(roles.base.config.target, attention="cudnn"))
    return roles


def _check_not_begun(folder: Path, writes: bool) -> None:
    if writes and (folder / "config.yaml").exists():
        raise UserError(f"run_dir {folder}: another process began a run there meanwhile; give the command again")


def _set_clock(run: Run, roles: Roles) -> datetime.datetime:
    """When the run began, or begins now: what chat templates take for the date, on every day and on every host."""
    template = roles.tokenizer.chats

    def time() -> bytes:
        return (begun_at(run.folder) or template.now()).isoformat().encode()

    began = datetime.datetime.fromisoformat(processes.from_first(time).decode())
    today = template.now().date()
    if template.uses_time and began.date() != today:
        run.say(f"run_dir {run.folder}: the chat template writes {began.date()}, when the run began, and not {today}")
    template.time = began
    return began


def _checksums(inputs: dict[str, Any]) -> dict[str, Any]:
    """A checksum of the tokens in each set of rows that was read, by stage and set."""
    return {
        stage: {name: rows.checksum() for name, rows in vars(read).items() if hasattr(rows, "checksum")}
        for stage, read in inputs.items()
    }


def _load_inputs(run: Run, roles: Roles, todo: list[str]) -> dict:
    """What each stage reads, so that a bad setting or row of the last one stops the run before the first.

    Settings come before any row, and PPO's reward functions and prompts before the larger sets.
    """
    stages = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
    for stage in todo:
        stages[stage].check(run, roles)
    return {stage: stages[stage].load(run, roles) for stage in reversed(todo)}

"""Runs the stages of a config in order. All inputs of all stages are read and checked first.

Finished stages are skipped, so the same command resumes a run.
"""

import contextlib
import dataclasses
import datetime
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.checkpoint.compilation_cache import cached_programs
from jaxrlhf.checkpoint.files import reason
from jaxrlhf.checkpoint.lock import RunLock
from jaxrlhf.checkpoint.run_dir import check_run, make_folder, open_run, record_start, started_at
from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import dump_config
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.jit import compiled_with
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.distributed.stopping import StopSignals
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.models.decoder import named_parameters, with_target
from jaxrlhf.models.fused_attention import check_device, check_model
from jaxrlhf.models.sharding import shard
from jaxrlhf.report.refresh import ReportFile
from jaxrlhf.stages import reward_model, sft
from jaxrlhf.stages.alarms import check_alarms
from jaxrlhf.stages.checks import end_notes
from jaxrlhf.stages.endings import ending, next_command, planned
from jaxrlhf.stages.fingerprints import check_fingerprints, fingerprints, record_fingerprints
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.metric_names import check_metrics
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.resuming import change_text, makes_longer, may_change
from jaxrlhf.stages.roles import Roles, check_none_missing, finished_stages, load_roles, mark_unfinished, save_base
from jaxrlhf.stages.unstarted import given_back
from jaxrlhf.tracking.metrics import MetricsLog
from jaxrlhf.tracking.trackers.process import TrackerProcess, check_clients, listen

SHARED = "give a folder on a file system that all hosts share"
STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo}


def run_stages(config: RunConfig, stop: StopSignals | None = None, dry_run: bool = False) -> Roles:
    """Runs the stages of `config` that have not finished yet, and returns the final roles.

    If `dry_run` is true, makes all checks, prints what would run, and returns. Then no program of a stage is compiled,
    and nothing is written. Raises `UserError`, before anything is compiled or written, if settings, files, rows or
    model are invalid, or if another process uses the run directory. Raises `Stopped` after a signal to `stop`.
    """
    # Absolute, because a reward function may change the working directory.
    folder, writes = Path(config.run_dir).absolute(), jax.process_index() == 0
    config = config.model_copy(update={"run_dir": str(folder)})
    run = Run(
        config,
        processes.agreed(lambda: make_mesh(config.mesh)),
        MetricsLog(folder / "metrics.jsonl" if writes else None),
        MetricsLog(folder / "samples.jsonl" if writes else None),
        stop,
        ReportFile(folder if writes and config.report else None),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiled_with(config.compiler_options))
        lock = stack.enter_context(RunLock(folder, writes, run.say))
        for log in run.logs.values():
            stack.enter_context(contextlib.closing(log))
        stack.enter_context(cached_programs(None if dry_run else config.compilation_cache, run.say))
        return _run_stages(run, lock, writes, stack, dry_run)


def _run_stages(run: Run, lock: RunLock, writes: bool, stack: contextlib.ExitStack, dry_run: bool) -> Roles:
    config, folder, allowed = run.config, run.folder, may_change(run.config)
    processes.agreed(lambda: check_metrics(config))
    processes.agreed(lambda: check_alarms(config))
    listener = processes.agreed(lambda: _check_trackers(config, writes))
    if listener is not None:
        stack.enter_context(contextlib.closing(listener))
    changes = processes.agreed(lambda: check_run(folder, dump_config(config), allowed))
    exists = (folder / "config.yaml").is_file()
    if exists and not dry_run:
        lock.take()
    roles = processes.agreed(lambda: _load_roles(run))
    for line in end_notes(config, roles.tokenizer):
        run.say(line)
    start = _set_clock(run, roles)
    finished = finished_stages(config.run_dir)
    continued = {"ppo"} & {*finished} if any(map(makes_longer, changes)) else set()
    todo = [stage for stage in config.stages if stage not in finished or stage in continued]
    for stage in config.stages:
        if stage not in todo:
            run.say(f"{stage}: already finished; next: {next_command(config, stage)}")
    processes.agreed(lambda: _check_checkpoints(run, todo))
    inputs = processes.agreed(lambda: _load_inputs(run, roles, todo))
    needs_base = config.model.new is not None and not (folder / "roles" / "base").is_dir()
    contents = {"adapters": sorted(roles.adapters), "finished": sorted(finished), "base to make": needs_base}
    # This check also waits until every process has read the directory. Process 0 writes to the directory next.
    processes.check_alike(f"contents of run_dir {folder}", contents, SHARED)
    if not processes.alone():
        processes.check_alike("data", _checksums(inputs), "give all hosts the same files of data and tokenizer")
    began_with = fingerprints(config, roles, inputs)
    notes = processes.agreed(lambda: check_fingerprints(folder, began_with) if exists else [])
    for text in (*(f"run_dir {folder}: {change_text(change)}" for change in changes), *notes):
        run.say(text)
    if dry_run:
        for stage in todo:
            run.say(planned(config, stage, inputs[stage]))
        run.say(
            "dry run: all checks passed, and nothing was written; without --dry-run the run writes its files to "
            f"{folder}"
        )
        return roles
    if not exists:
        made = processes.agreed(lambda: make_folder(folder) if writes else [])
        lock.take()
        processes.agreed(lambda: _check_still_new(folder, writes))
        stack.enter_context(given_back(folder, made, writes))
    for stage in continued if writes else ():
        mark_unfinished(config.run_dir, stage)
    processes.agreed(lambda: open_run(folder, dump_config(config), writes, allowed))
    if writes:
        record_start(folder, start)
        record_fingerprints(folder, began_with)
    processes.barrier()
    written = {"config.yaml": "present" if (folder / "config.yaml").is_file() else "absent"}
    processes.check_alike(f"contents of run_dir {folder}", written, SHARED)
    if needs_base:
        save_base(config.run_dir, roles.base, roles.tokenizer)
    roles.base = shard(run.mesh, roles.base)
    if writes and (config.trackers or listener is not None):
        stack.enter_context(TrackerProcess(folder, config.trackers, listener, run.say))
    if todo:
        stack.callback(run.report.write)  # writes the report also if the run fails or is stopped
    for stage in todo:
        with _disk_faults(folder):
            roles = STAGES[stage].train(run, roles, inputs[stage])
        for line in ending(config, stage, finished_stages(config.run_dir)[stage]) if writes else ():
            run.say(line)
    return roles


@contextlib.contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Raises `Fault` instead of a disk error: the run has started, so the user's input is not what is wrong."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or hasattr(error, "elsewhere"):
            raise
        raise Fault(f"{cause.filename or folder}: {reason(cause)}") from error


def _check_trackers(config: RunConfig, writes: bool) -> socket.socket | None:
    """Returns the socket of `prometheus_port` on the process that writes. Raises `UserError` if a client is missing."""
    if not writes:
        return None
    check_clients(config.trackers)
    return listen(config.prometheus_port)


def _load_roles(run: Run) -> Roles:
    check_none_missing(run.config)
    roles = load_roles(run.config, run.mesh)
    if run.config.model.attention == "cudnn":
        check_model(roles.base.config, run.mesh.shape["tensor"])
        check_device(roles.base.config, named_parameters(roles.base)["embed_tokens/embedding"].dtype)
        roles.base = with_target(roles.base, dataclasses.replace(roles.base.config.target, attention="cudnn"))
    return roles


def _check_checkpoints(run: Run, todo: list[str]) -> None:
    """Raises `UserError` if a stage has logged steps but the folder with its checkpoints is missing."""
    for stage in {*run.metrics.stages()} & {*todo}:
        folder = run.folder / "checkpoints" / stage
        if not folder.is_dir():
            raise UserError(
                f"{folder}: is missing, but metrics.jsonl has steps of the stage {stage}; restore it from a copy, or "
                "give another run_dir"
            )


def _check_still_new(folder: Path, writes: bool) -> None:
    """Raises `UserError` if another process has started a run in the folder since this process read the folder."""
    if writes and (folder / "config.yaml").exists():
        raise UserError(
            f"run_dir {folder}: another process has just started a run in this folder; run the command again"
        )


def _set_clock(run: Run, roles: Roles) -> datetime.datetime:
    """Sets the date of chat templates to the start of the run, on all processes. Returns the start of the run."""
    template = roles.tokenizer.chats

    def time() -> bytes:
        return (started_at(run.folder) or template.now()).isoformat().encode()

    start = datetime.datetime.fromisoformat(processes.from_first(time).decode())
    today = template.now().date()
    if template.uses_time and start.date() != today:
        run.say(
            f"run_dir {run.folder}: the chat template writes the date {start.date()}, on which the run started, "
            f"instead of today's date {today}"
        )
    template.time = start
    return start


def _checksums(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the checksums of the token rows, by stage and data set."""
    return {
        stage: {name: rows.checksum() for name, rows in vars(data).items() if hasattr(rows, "checksum")}
        for stage, data in inputs.items()
    }


def _load_inputs(run: Run, roles: Roles, todo: list[str]) -> dict:
    """Checks and reads the inputs of all stages, so that their errors are found before the first stage runs.

    Settings are checked before rows are read. PPO's rewards and prompts are read before the larger data sets.
    """
    for stage in todo:
        STAGES[stage].check(run, roles)
    return {stage: STAGES[stage].load(run, roles) for stage in reversed(todo)}

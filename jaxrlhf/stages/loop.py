"""The host loop shared by all stages: resuming, checkpoints, logging and progress."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.mesh import finite_leaves
from jaxrlhf.distributed.stopping import Stopped, StopSignals
from jaxrlhf.errors import Diverged, Fault, printable
from jaxrlhf.models.sharding import shard
from jaxrlhf.report.refresh import ReportFile
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.tracking.health import Health, stop_with_batch
from jaxrlhf.tracking.metrics import MetricsLog, Progress


@dataclasses.dataclass(frozen=True)
class Run:
    """A running training run: settings, mesh and logs."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    metrics: MetricsLog
    samples: MetricsLog
    stop: StopSignals | None = None
    report: ReportFile = dataclasses.field(default_factory=lambda: ReportFile(None))

    @property
    def logs(self) -> dict[str, MetricsLog]:
        """Both logs, by name."""
        return {"metrics": self.metrics, "samples": self.samples}

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    def say(self, text: str) -> None:
        """Prints a line on stderr, on process 0 only."""
        if processes.is_first():
            print(printable(text), file=sys.stderr, flush=True)


class Loop:
    """The steps of one stage, from its last checkpoint on. `state` is all that the next step depends on.

    with Loop(run, "sft", state, total, save_every) as loop:
        for step in loop.steps():
            loop.state, metrics = program(loop.state, ...)
            loop.submitted(step, metrics, shown={...}, tokens=n)
        adapter = loop.result().adapter

    `submitted` reads the metrics one step later, so that the devices are never idle. A stage that reads the metrics
    itself calls `done` instead. A step must write its other log lines before that call: the call may save a checkpoint,
    and lines written after it are lost on resume.
    """

    def __init__(self, run: Run, stage: str, state: Any, total: int, save_every: int):
        self.run, self.stage, self.total, self.save_every = run, stage, total, save_every
        self.settings = run.config.checkpoints
        folder = run.folder / "checkpoints" / stage
        lowest = self.settings.best_is == "lowest"
        self.checkpoints = Checkpoints(folder, self.settings.keep, self.settings.best or "", lowest)
        self.state = shard(run.mesh, state)
        latest = self.checkpoints.restore_latest(self.state, run.say)
        self.first, notes = 0, {}
        if latest is not None:
            self.first, self.state, notes = latest.step, latest.tree, latest.notes
            run.say(f"{stage}: resumes after step {self.first} of {total}")
            self._compare_mesh(notes.get("mesh"))
        elif lost := run.metrics.stages()[stage]:
            run.say(f"{stage}: no checkpoint was saved; begins again; its {lost} lines of metrics.jsonl are removed")
        for name, log in run.logs.items():
            lines = notes.get("lines", {}).get(name)
            if missing := log.truncate(stage, self.first, lines):
                run.say(f"{stage}: {missing} of the first {lines} lines of {name}.jsonl are missing; continuing")
        self.health = Health(run.config.health.patience, notes.get("unlearnt", 0))
        self.reached = self.first  # number of steps done in `state`
        self.progress = Progress(stage, total, self.first)
        self._step_start = time.perf_counter()
        self._unread: Callable[[], None] | None = None  # the postponed `done` of the last submitted step

    def _compare_mesh(self, before: dict[str, int] | None) -> None:
        now = dict(self.run.mesh.shape)
        if before not in (None, now):
            self.run.say(
                f"{self.stage}: the checkpoint was made on the mesh {_sizes(before)}, this one is {_sizes(now)}: sums "
                "may round differently, so the run may not continue bit for bit"
            )

    def steps(self) -> Iterator[int]:
        """Yields the remaining step numbers, from 0. Raises `Stopped` between steps after a signal."""
        self._step_start = time.perf_counter()
        for step in range(self.first, self.total):
            self._check_interruption()
            yield step
        self._check_interruption()

    def submitted(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int, batch: Any = None
    ) -> None:
        """Postpones `done` until the next step is submitted.

        If a checkpoint is due after this step, calls it at once: the next step reuses the memory of the state.
        """
        self._read()
        self._unread = functools.partial(self.done, step, metrics, shown, tokens, batch)
        if self._due(step + 1):
            self._read()

    def _read(self) -> None:
        """Calls the postponed `done` if there is one."""
        unread, self._unread = self._unread, None
        if unread is not None:
            unread()

    def _due(self, reached: int) -> bool:
        return reached % self.save_every == 0 or reached == self.total

    def done(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int, batch: Any = None
    ) -> None:
        """Logs a step and saves a checkpoint if one is due. `shown` maps progress labels to metric names.

        The metric `seconds` is the time since the previous step was logged and saved. Raises `Fault` after too many
        steps in a row without an update, and writes `batch` to the run directory for inspection.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.run.metrics.write(self.stage, step + 1, {"seconds": time.perf_counter() - self._step_start, **values})
        self.progress.update({label: values[name] for label, name in shown.items()}, tokens)
        self.reached = step + 1
        reason = self.health.observe(values)
        if reason is not None:
            folder = self.run.folder / "inspect"
            stop_with_batch(folder, self.stage, self.reached, batch, reason, self.health.in_a_row)
        if step == self.first and self.settings.best not in (None, *values):
            self.run.say(f"{self.stage}: has no metric {self.settings.best}, so no checkpoint counts as the best")
        if self._due(self.reached):
            self._save_if_learning(values.get(self.settings.best))
        self._step_start = time.perf_counter()

    def _save_if_learning(self, score: float | None) -> None:
        """Saves a regular checkpoint, unless the last step made no update: then older, better ones are kept.

        Resuming repeats those steps with the same result. Raises `Diverged` at the end of a stage without any update.
        """
        if self.reached == self.total <= self.health.in_a_row:
            raise Diverged(
                f"{self.stage}: all {self.total} steps skipped updates: a loss or gradient was not finite, or KL "
                f"or length was above its limit (see {self.run.folder / 'metrics.jsonl'}); correct data or settings, "
                "and start a new run in another run_dir"
            )
        if self.reached == self.total or not self.health.in_a_row:
            self._save(score)

    def _check_finite(self) -> None:
        """Raises `Diverged` if the state has NaN or infinite values; checkpoints saved before stay as they are."""
        bad = [path for path, finite in jax.tree_util.tree_leaves_with_path(finite_leaves(self.state)) if not finite]
        if bad:
            name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
            saved = self.checkpoints.on_disk
            kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint before it"
            raise Diverged(
                f"{self.stage}: {name} is not finite after step {self.reached}; {kept}; start a new run in another "
                "run_dir, with a lower learning rate or max_grad_norm"
            )

    def _save(self, score: float | None = None) -> None:
        """Saves a checkpoint. Only regular checkpoints have a score: an interruption must not change the best one."""
        self._check_finite()
        lines = {}
        for name, log in self.run.logs.items():
            lines[name] = log.lines()
            log.sync()
        notes = {"lines": lines, "mesh": dict(self.run.mesh.shape), "unlearnt": self.health.in_a_row}
        self.checkpoints.save(self.reached, self.state, score, notes)
        self.run.report.refresh()

    def _check_interruption(self) -> None:
        """Raises `Fault` if a save has failed. Saves and raises `Stopped` if a process got a signal."""
        if processes.alone() and self.checkpoints.failed:  # several processes check this together, at the next save
            self._read()
            self.checkpoints.wait()
        if signal := self._signal():
            self._read()  # the state already includes this step
            if self.reached > self.first:
                self._save()
            self.checkpoints.wait()
            processes.barrier()  # a launcher ends all processes when one ends
            raise self._stopped(signal)

    def _signal(self) -> int:
        """The number of the signal that asks the run to stop, or 0 if there was no signal."""
        return self.run.stop.due() if self.run.stop is not None else 0

    def _stopped(self, signal: int) -> Stopped:
        saved = f"step {self.reached} of {self.total} is saved" if self.reached else "before the first step was done"
        return Stopped(signal, f"{self.stage}: {saved}")

    def result(self) -> Any:
        """Returns the final state, or the state of the best checkpoint if `checkpoints.result` is best."""
        best = self.checkpoints.best() if self.settings.result == "best" else None
        if best is None or best.step == self.reached:
            return self.state
        self.run.say(f"{self.stage}: uses step {best.step}, which has the best {self.settings.best}: {best.score:.4g}")
        return self.checkpoints.restore(best.step, self.state)

    def _losing(self) -> str:
        """A message that says which steps would be lost if the process ended now."""
        saved, current = self.checkpoints.on_disk or 0, min(self.reached + 1, self.total)
        return f"{self.stage}: step {saved} is saved, later steps are lost (step {current} was running)"

    def __enter__(self) -> "Loop":
        if self.run.stop is not None:
            self.run.stop.at_work = self._losing
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: object) -> None:
        """Closes progress and checkpoints. Saves the state after a `RewardFault`: it is intact then."""
        self.progress.close()
        if error is not None and not processes.alone() and not isinstance(error, RewardFault | Stopped):
            return  # other processes may not have this error, and saving needs all of them
        try:
            if isinstance(error, RewardFault) and self.reached > self.first:
                self._save()
            self.checkpoints.close()
            if isinstance(error, RewardFault):  # raised on all processes
                processes.barrier()
        except Fault as fault:
            if kind is None:
                raise
            self.run.say(f"{self.stage}: {fault}")  # the original error propagates
        finally:
            if self.run.stop is not None:
                self.run.stop.at_work = None
        if kind is None and (signal := self._signal()):
            raise self._stopped(signal)


def _sizes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())

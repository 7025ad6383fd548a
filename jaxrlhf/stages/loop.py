"""What the host loops of all stages share: resuming, saving, logging, and the line of progress."""

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
from jaxrlhf.distributed.stopping import Stopped, StopSignals
from jaxrlhf.errors import Fault
from jaxrlhf.models.sharding import shard
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.tracking.health import Health, stop_with_batch
from jaxrlhf.tracking.metrics import MetricsLog, Progress


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is under way: its settings, its devices and its two logs."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    metrics: MetricsLog
    samples: MetricsLog
    stop: StopSignals | None = None  # whoever may ask the run to stop

    @property
    def logs(self) -> dict[str, MetricsLog]:
        """Both logs by name."""
        return {"metrics": self.metrics, "samples": self.samples}

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def say(self, text: str) -> None:
        """A line for the person at the keyboard; on several hosts one process speaks."""
        if processes.is_first():
            print(text, file=sys.stderr, flush=True)


class Loop:
    """One stage's steps from the last checkpoint on; `state` is all that the next step depends on.

    with Loop(run, "sft", state, total, save_every) as loop:
        for step in loop.steps():
            loop.state, metrics = program(loop.state, ...)
            loop.submitted(step, metrics, shown={...}, tokens=n)
        adapter = loop.result().adapter

    With `submitted` the devices have the next step before the host waits for this one. A stage that has read a step's
    metrics itself calls `done`. What else a step logs stands before the call, which may save the step: a line that came
    later could be lost.
    """

    def __init__(self, run: Run, stage: str, state: Any, total: int, save_every: int):
        self.run, self.stage, self.total, self.save_every = run, stage, total, save_every
        self.settings = run.config.checkpoints
        folder = run.folder / "checkpoints" / stage
        scored, lowest = self.settings.best or "", self.settings.best_is == "lowest"
        self.checkpoints = Checkpoints(folder, self.settings.keep, scored, lowest)
        self.state = shard(run.mesh, state)
        found = self.checkpoints.restore_latest(self.state, run.say)
        self.first, notes = 0, {}
        if found is not None:
            self.first, self.state, notes = found.step, found.tree, found.notes
            run.say(f"{stage}: goes on after step {self.first} of {total}")
            self._compare_mesh(notes.get("mesh"))
        for name, log in run.logs.items():
            lines = notes.get("lines", {}).get(name)
            if gone := log.truncate(stage, self.first, lines):
                run.say(f"{stage}: {gone} of the first {lines} lines of {name}.jsonl are gone; the run goes on without")
        self.health = Health(run.config.health.patience, notes.get("unlearnt", 0))
        self.reached = self.first  # steps done: those that `state` holds
        self.progress = Progress(stage, total, self.first)
        self._began = time.perf_counter()
        self._unread: Callable[[], None] | None = None  # `done` of the step whose metrics are still to be read

    def _compare_mesh(self, before: dict[str, int] | None) -> None:
        now = dict(self.run.mesh.shape)
        if before not in (None, now):
            self.run.say(
                f"{self.stage}: the checkpoint was made on the mesh {_sizes(before)}, this one is {_sizes(now)}: sums "
                "round otherwise, so what follows is not bit for bit what it would have been"
            )

    def steps(self) -> Iterator[int]:
        """Steps that are still to be done, counted from 0. Raises `Stopped` between two of them where a signal came."""
        self._began = time.perf_counter()
        for step in range(self.first, self.total):
            self._between_steps()
            yield step
        self._between_steps()

    def submitted(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int, batch: Any = None
    ) -> None:
        """`done` for a step that the devices have just been given: it is called one step later, in the same order.

        A step at which a checkpoint is due is waited for at once: the next one takes over the memory of its state.
        """
        self._read()
        self._unread = functools.partial(self.done, step, metrics, shown, tokens, batch)
        if self._due(step + 1):
            self._read()

    def _read(self) -> None:
        """Calls `done` for the step that `submitted` put off, if any."""
        unread, self._unread = self._unread, None
        if unread is not None:
            unread()

    def _due(self, reached: int) -> bool:
        return reached % self.save_every == 0 or reached == self.total

    def done(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int, batch: Any = None
    ) -> None:
        """Logs a step, and saves where it is due. `shown` maps labels of the progress line to metric names.

        The metric `seconds` is the time since the step before was logged and saved. Raises `Fault` where too many steps
        in a row were not learnt from; `batch` is then saved to be looked at.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.run.metrics.write(self.stage, step + 1, {"seconds": time.perf_counter() - self._began, **values})
        self.progress.update({label: values[name] for label, name in shown.items()}, tokens)
        self.reached = step + 1
        reason = self.health.observe(values)
        if reason is not None:
            folder = self.run.folder / "inspect"
            stop_with_batch(folder, self.stage, self.reached, batch, reason, self.health.in_a_row)
        if step == self.first and self.settings.best not in (None, *values):
            self.run.say(f"{self.stage}: has no metric {self.settings.best}: no checkpoint counts as the best")
        if self._due(self.reached):
            self._save(values.get(self.settings.best))
        self._began = time.perf_counter()

    def _save(self, score: float | None = None) -> None:
        """Only a step at which a checkpoint is due has a score: an interruption must not change which is the best."""
        lines = {}
        for name, log in self.run.logs.items():
            lines[name] = log.lines()
            log.sync()
        notes = {"lines": lines, "mesh": dict(self.run.mesh.shape), "unlearnt": self.health.in_a_row}
        self.checkpoints.save(self.reached, self.state, score, notes)

    def _between_steps(self) -> None:
        """Ends the run where a save has failed, or a signal came to any process: then with what has been done saved."""
        if processes.alone() and self.checkpoints.failed:  # several processes learn of it together, at the next save
            self._read()
            self.checkpoints.wait()
        if asked := self._asked():
            self._read()  # the state is that of this step
            if self.reached > self.first:
                self._save()
            self.checkpoints.wait()
            processes.barrier()  # a launcher ends all when one has ended
            raise self._stopped(asked)

    def _asked(self) -> int:
        return self.run.stop.due() if self.run.stop is not None else 0

    def _stopped(self, number: int) -> Stopped:
        saved = f"step {self.reached} of {self.total} is saved" if self.reached else "before its first step was done"
        return Stopped(number, f"{self.stage}: {saved}")

    def result(self) -> Any:
        """The state that the stage hands on: after the last step, or of the best checkpoint where settings say so."""
        best = self.checkpoints.best() if self.settings.result == "best" else None
        if best is None or best.step == self.reached:
            return self.state
        self.run.say(f"{self.stage}: hands on step {best.step}, with {self.settings.best} {best.score:.4g} the best")
        return self.checkpoints.restore(best.step, self.state)

    def _losing(self) -> str:
        """What would be lost if the process ended now."""
        saved, under_way = self.checkpoints.on_disk or 0, min(self.reached + 1, self.total)
        return f"{self.stage}: step {saved} is saved, what came after it is lost (step {under_way} was under way)"

    def __enter__(self) -> "Loop":
        if self.run.stop is not None:
            self.run.stop.at_work = self._losing
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: object) -> None:
        """Closes what is open. Where a reward failed, which is before the state is given away, the state is saved."""
        self.progress.close()
        if error is not None and not processes.alone() and not isinstance(error, RewardFault | Stopped):
            return  # only this process may know: it ends at once, for to save is what all do together
        try:
            if isinstance(error, RewardFault) and self.reached > self.first:
                self._save()
            self.checkpoints.close()
            if isinstance(error, RewardFault):  # which all processes see alike
                processes.barrier()
        except Fault as fault:
            if kind is None:
                raise
            self.run.say(f"{self.stage}: {fault}")  # what ended the run goes on
        finally:
            if self.run.stop is not None:
                self.run.stop.at_work = None
        if kind is None and (asked := self._asked()):
            raise self._stopped(asked)


def _sizes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())

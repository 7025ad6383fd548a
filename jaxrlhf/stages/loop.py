"""What the host loops of all stages share: resuming, saving, logging, and the line of progress."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import RunConfig
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.runtime import hosts
from jaxrlhf.runtime.checkpoints import Checkpoints
from jaxrlhf.runtime.mesh import place
from jaxrlhf.runtime.metrics import MetricsLog, Progress


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is under way: its settings, its devices and its two logs."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    metrics: MetricsLog
    samples: MetricsLog

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def say(self, text: str) -> None:
        """A line for the person at the keyboard; on several hosts one process speaks."""
        if hosts.is_first():
            print(text, file=sys.stderr, flush=True)


class Loop:
    """One stage's steps from the last checkpoint on; `state` is all that the next step depends on.

    with Loop(run, "sft", state, total, save_every) as loop:
        for step in loop.steps():
            loop.state, metrics = program(loop.state, ...)
            loop.done(step, metrics, shown={...}, tokens=n)
    """

    def __init__(self, run: Run, stage: str, state: Any, total: int, save_every: int):
        self.run, self.stage, self.total, self.save_every = run, stage, total, save_every
        self.checkpoints = Checkpoints(run.folder / "checkpoints" / stage)
        self.state = place(run.mesh, state)
        self.first = self.checkpoints.latest_step() or 0
        if self.first:
            self.state = self.checkpoints.restore(self.first, self.state)
            run.say(f"{stage}: goes on after step {self.first} of {total}")
        for log in (run.metrics, run.samples):
            log.truncate(stage, self.first)
        self.reached = self.first  # steps done: those that `state` holds
        self.progress = Progress(stage, total, self.first)
        self._began = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """Steps that are still to be done, counted from 0."""
        for step in range(self.first, self.total):
            self._began = time.perf_counter()
            yield step

    def done(self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int) -> None:
        """Logs a step, and saves where it is due. `shown` maps labels of the progress line to metric names."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.run.metrics.write(self.stage, step + 1, {"seconds": time.perf_counter() - self._began, **values})
        self.progress.update({label: values[name] for label, name in shown.items()}, tokens)
        self.reached = step + 1
        if self.reached % self.save_every == 0 or self.reached == self.total:
            self.checkpoints.save(self.reached, self.state)

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: object) -> None:
        """Closes what is open. Where a reward failed, which is before the state is given away, the state is saved."""
        self.progress.close()
        if error is not None and not isinstance(error, RewardFault):  # that one all processes see, and save alike
            hosts.failed(error)
        if kind is not None and issubclass(kind, RewardFault) and self.reached > self.first:
            self.checkpoints.save(self.reached, self.state)
        self.checkpoints.close()

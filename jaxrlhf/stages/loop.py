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
from jaxrlhf.config import OptimizerConfig, RunConfig
from jaxrlhf.data.streamed import StreamedBatches, StreamedPrompts
from jaxrlhf.data.streams import StreamFault
from jaxrlhf.data.success import Success
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.jit import watch_compiles
from jaxrlhf.distributed.stopping import Stopped, StopSignals
from jaxrlhf.errors import Fault, printable
from jaxrlhf.models.sharding import shard
from jaxrlhf.report.refresh import ReportFile
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.alarms import CONTINUE, stage_alarms, wait_for_user
from jaxrlhf.stages.evaluation import Evaluated
from jaxrlhf.stages.improvement import Watch
from jaxrlhf.stages.metric_names import PREFIX, metrics_of
from jaxrlhf.stages.resuming import mesh_note
from jaxrlhf.tracking.alarms import StoppedByAlarm
from jaxrlhf.tracking.health import Health, check_finite, never_updated, stop_with_batch
from jaxrlhf.tracking.metrics import MetricsLog
from jaxrlhf.tracking.profiler import StepProfiler
from jaxrlhf.tracking.progress import Progress

KEPT = RewardFault | StreamFault  # faults after which the state is valid; they are raised on all processes


@dataclasses.dataclass(frozen=True)
class Run:
    """A run while it trains: settings, mesh and logs."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    metrics: MetricsLog
    samples: MetricsLog
    stop: StopSignals | None = None
    report: ReportFile = dataclasses.field(default_factory=lambda: ReportFile(None))

    @property
    def logs(self) -> dict[str, MetricsLog]:
        """The logs metrics and samples, by name."""
        return {"metrics": self.metrics, "samples": self.samples}

    @property
    def folder(self) -> Path:
        """Returns the run directory."""
        return Path(self.config.run_dir)

    def say(self, text: str) -> None:
        """Prints a line on stderr, on process 0 only."""
        if processes.is_first():
            print(printable(text), file=sys.stderr, flush=True)


class Loop:
    """The steps of one stage that follow its last checkpoint. The next step depends on nothing but `state`.

    with Loop(run, "sft", state, total, save_every) as loop:
        for step in loop.steps():
            loop.state, metrics = program(loop.state, ...)
            loop.submitted(step, metrics, shown={...}, tokens=n)
        adapter = loop.result().adapter

    `submitted` reads the metrics one step later, so that the devices are never idle. A stage that reads the metrics
    itself calls `done` instead. A step must write its other log lines before it calls `submitted` or `done`: the call
    may save a checkpoint, and lines that are written after the checkpoint are lost on resume.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        state: Any,
        total: int,
        save_every: int,
        evaluate: Callable[[Any], Evaluated] | None = None,
        optimizers: Mapping[str, OptimizerConfig] | None = None,
        rows: StreamedBatches | StreamedPrompts | Success | None = None,
        position: Callable[[Any], int] | None = None,
    ):
        """`rows` chooses the rows of the steps. Its notes are saved in checkpoints.

        `position(state)` returns the number of batches or draws so far. If `position` is None, the number of steps is
        used.
        """
        section = getattr(run.config, stage)
        self.run, self.stage, self.total, self.save_every = run, stage, total, save_every
        self.planned, self._evaluate, self._every = total, evaluate, section.evaluation.every
        self._rows, self._position = rows, position
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
            if note := mesh_note(notes.get("mesh"), dict(run.mesh.shape)):
                run.say(f"{stage}: {note}")
            if rows is not None:
                rows.resume(notes["rows"])
        elif lost := run.metrics.stages()[stage]:
            run.say(f"{stage}: has no checkpoint, so it begins again; its {lost} lines of metrics.jsonl are removed")
        for name, log in run.logs.items():
            lines = notes.get("lines", {}).get(name)
            if missing := log.truncate(stage, self.first, lines):
                run.say(
                    f"{stage}: {missing} of the first {lines} lines of {name}.jsonl are missing; the stage continues"
                )
        self.watch = Watch(section.early_stopping, optimizers or {}, notes)
        self.health = Health(run.config.health.patience, notes.get("unlearnt", 0))
        self.reached = self.first  # number of steps done in `state`
        self.alarms = stage_alarms(run.config, stage, notes.get("alarms", {}), run.say)
        self.progress = Progress(stage, total, self.first)
        self.profiler = StepProfiler(run.config.profile, stage, run.folder, self.first, total, run.say)
        self._step_start = time.perf_counter()
        self._unread: Callable[[], None] | None = None  # the postponed `done` of the last submitted step
        self._evaluating = False
        self._evaluated: tuple[int, Evaluated] | None = None  # the last evaluation and its step
        self._end_if_stopped()

    def steps(self) -> Iterator[int]:
        """Yields the remaining step numbers; the first step of a stage is 0.

        Raises `Stopped` between steps after a signal.
        """
        self._step_start = time.perf_counter()
        step = self.first
        while step < self.total:  # early stopping lowers `total`
            self._check_interruption()
            self.profiler.begin(step + 1, self.state)
            yield step
            self.profiler.end(step + 1, self.state)
            step += 1
        self._check_interruption()

    def submitted(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int, batch: Any = None
    ) -> None:
        """Postpones `done` until the next step is submitted.

        Calls `done` immediately if the next step depends on the metrics, or if a checkpoint or an evaluation is due.
        These need the state, and the next step reuses the memory of the state. If `done` is postponed, the metric
        `seconds` is the time since the previous step was submitted.
        """
        began, now = self._step_start, time.perf_counter()
        self._read()
        if self._due(step + 1) or self._evaluates(step + 1) or self.watch.needs_every_step:
            self._step_start = began
            self.done(step, metrics, shown, tokens, batch)
        else:
            metrics = {"seconds": now - began, **metrics}
            self._unread = functools.partial(self.done, step, metrics, shown, tokens, batch)
            self._step_start = now

    def _read(self) -> None:
        """Calls the postponed `done` if there is one."""
        unread, self._unread = self._unread, None
        if unread is not None:
            unread()

    def _due(self, reached: int) -> bool:
        """Whether a checkpoint is due.

        If evaluations decide which checkpoint is the best, each evaluation needs a checkpoint.
        """
        candidate = (self.settings.best or "").startswith(PREFIX) and self._evaluates(reached)
        return reached % self.save_every == 0 or reached == self.total or candidate

    def _evaluates(self, reached: int) -> bool:
        if self._evaluate is None or self._every is None:
            return False
        return reached % self._every == 0 or reached == self.total

    def done(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, str], tokens: int, batch: Any = None
    ) -> None:
        """Logs a step. Evaluates and saves a checkpoint if these are due. `shown` maps progress labels to metric names.

        The metric `seconds` is the time since the previous step was logged and saved. Raises `Fault` after too many
        steps in a row without an update, and writes `batch` to the run directory for inspection.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        values = {"seconds": time.perf_counter() - self._step_start, **values}
        self.reached = step + 1
        self._observe(values)
        if self._evaluates(self.reached):
            values |= self._evaluation()
        values |= self.alarms.observe(self.reached, values)
        self.run.metrics.write(self.stage, self.reached, values)
        self.progress.update({label: values[name] for label, name in shown.items()}, tokens, self.alarms.active)
        reason = self.health.observe(values)
        if reason is not None:
            folder = self.run.folder / "inspect"
            stop_with_batch(folder, self.stage, self.reached, batch, reason, self.health.in_a_row)
        if step == self.first and self.settings.best not in (None, *values, *self._evaluated_names()):
            self.run.say(
                f"{self.stage}: does not log the metric {self.settings.best} (checkpoints.best), so no checkpoint "
                "counts as the best"
            )
        if self._due(self.reached):
            self._save_if_learning(values.get(self.settings.best))
        self._step_start = time.perf_counter()

    def _evaluated_names(self) -> set[str]:
        return {name for name in metrics_of(self.run.config, self.stage) if name.startswith(PREFIX)}

    def _evaluation(self) -> dict[str, float]:
        """Evaluates the state, and returns its metrics. Writes the record of the evaluation to samples.jsonl."""
        start, self._evaluating = time.perf_counter(), True
        evaluated = self._evaluate(self.state)
        self._evaluated, self._evaluating = (self.reached, evaluated), False
        if evaluated.record:
            self.run.samples.write(self.stage, self.reached, evaluated.record)
        values = {f"{PREFIX}{name}": value for name, value in evaluated.metrics.items()}
        if self.reached % self._every == 0:  # not only because it is the last step
            self._observe(values)
        seconds = time.perf_counter() - start
        self.progress.leave_out(seconds)
        return values | {"time/evaluation": seconds}

    def _observe(self, values: Mapping[str, float]) -> None:
        """Lowers learning rates or ends the stage after this step, if watched metrics in `values` stopped improving."""
        for line in self.watch.observe(self.reached, values):
            self.run.say(f"{self.stage}: {line}")
        self._end_if_stopped()

    def _end_if_stopped(self) -> None:
        if self.watch.stops and self.reached < self.total:
            self.total = self.progress.total = self.reached
            early = self.watch.early_stopping.text()
            self.run.say(f"{self.stage}: stops early, after step {self.total} of {self.planned}: {early}")

    def ends_at(self, step: int | None) -> None:
        """Sets the number of steps to `step`, unless `step` is None or later than the planned end."""
        if step is not None and step < self.total:
            self.total = self.planned = self.progress.total = step

    def stopped_early(self) -> dict[str, Any]:
        """Returns {"stopped_early": ...} for the stage's results, or {} if all steps were done."""
        if self.total == self.planned:
            return {}
        early = self.watch.early_stopping
        best = {"metric": early.config.metric, "best": early.best, "best_step": early.best_step}
        return {"stopped_early": {"step": self.total, "of": self.planned, **best}}

    def evaluated(self, state: Any) -> Evaluated:
        """Returns the evaluation of a result of the stage.

        Computes it unless the last step has evaluated the same state.
        """
        if self._evaluated is not None and self._evaluated[0] == self.reached and state is self.state:
            return self._evaluated[1]
        return self._evaluate(state)

    def _save_if_learning(self, score: float | None) -> None:
        """Saves a regular checkpoint, unless the last step made no update.

        After a step without an update nothing is saved, so the latest checkpoint is kept. A resumed run repeats the
        steps after that checkpoint, with the same result. Raises `Diverged` at the end of a stage without any update.
        """
        if self.reached == self.total <= self.health.in_a_row:
            raise never_updated(self.stage, self.total, self.run.folder)
        if self.reached == self.total or not self.health.in_a_row:
            self._save(score)

    def _save(self, score: float | None = None) -> None:
        """Saves a checkpoint.

        Only regular checkpoints have a score, so that an interruption does not change which one is best.
        """
        check_finite(self.state, self.stage, self.reached, self.checkpoints.on_disk)
        lines = {}
        for name, log in self.run.logs.items():
            lines[name] = log.lines()
            log.sync()
        notes = {"lines": lines, "mesh": dict(self.run.mesh.shape), "unlearnt": self.health.in_a_row}
        notes |= self.watch.notes() | {"alarms": self.alarms.notes()}
        if self._rows is not None:
            position = self.reached if self._position is None else self._position(self.state)
            notes |= {"rows": self._rows.notes(position)}
        self.checkpoints.save(self.reached, self.state, score, notes)
        self.run.report.refresh()

    def _check_interruption(self) -> None:
        """Raises `Fault` if a save has failed.

        After a signal, saves and raises `Stopped`. After an alarm, saves first. If its `do` is stop, the run then
        ends. If it is pause, this method waits for the file that continues the run.
        """
        if processes.alone() and self.checkpoints.failed:  # several processes check it at the next save
            self._read()
            self.checkpoints.wait()
        if signal := self._signal():
            self._save_now()
            raise self._stopped(signal)
        if action := self.alarms.action():
            self._save_now()
            self._obey(action)

    def _save_now(self) -> None:
        """Saves between two regular checkpoints, and waits until the checkpoint is on disk."""
        self._read()  # the state already includes this step
        if self.reached > self.first:
            self._save()
        self.checkpoints.wait()
        processes.barrier()  # a launcher ends all processes when one process ends

    def _obey(self, action: str) -> None:
        """Stops the run, or waits for the user. The last step is already saved."""
        names, saved = ", ".join(self.alarms.due), f"step {self.reached} of {self.total} is saved"
        self.alarms.due.clear()
        if action == "stop":
            raise StoppedByAlarm(f"{self.stage}: stopped by alarm {names}; {saved}")
        file = self.run.folder / CONTINUE
        self.run.say(f"{self.stage}: paused by alarm {names}; {saved}; create the file {file} to continue")
        began = time.perf_counter()
        if signal := wait_for_user(self.run.folder, self._signal):
            raise self._stopped(signal)
        self.run.say(f"{self.stage}: continues")
        self.progress.leave_out(time.perf_counter() - began)
        self._step_start = time.perf_counter()

    def _signal(self) -> int:
        """Returns the number of the signal that asks the run to stop, or 0 if there was no signal."""
        return self.run.stop.due() if self.run.stop is not None else 0

    def _stopped(self, signal: int) -> Stopped:
        saved = f"step {self.reached} of {self.total} is saved" if self.reached else "before the first step was done"
        return Stopped(signal, f"{self.stage}: {saved}")

    def result(self) -> Any:
        """Returns the final state, or the state of the best checkpoint if `checkpoints.result` is best."""
        best = self.checkpoints.best() if self.settings.result == "best" else None
        if best is None or best.step == self.reached:
            return self.state
        self.run.say(
            f"{self.stage}: the result is the checkpoint of step {best.step}, with the best {self.settings.best}: "
            f"{best.score:.4g}"
        )
        return self.checkpoints.restore(best.step, self.state)

    def _losing(self) -> str:
        """Returns a message that says which steps would be lost if the process ended now."""
        saved, current = self.checkpoints.on_disk or 0, min(self.reached + 1, self.total)
        return f"{self.stage}: step {saved} is saved; later steps are lost (step {current} was running)"

    def __enter__(self) -> "Loop":
        self.progress.open()
        watch_compiles(self.progress.compiling)
        if self.run.stop is not None:
            self.run.stop.at_work = self._losing
            self.run.stop.say = self.progress.say if self.progress.live else None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: object) -> None:
        """Closes progress and checkpoints.

        Saves the state after a fault in `KEPT`, because that fault does not damage the state. Nothing is saved after a
        fault during an evaluation, because the step is not logged yet.
        """
        watch_compiles(None)
        if self.run.stop is not None:
            self.run.stop.say = None
        self.progress.close()
        self.alarms.close(wait=kind is None)
        self.profiler.close()
        if error is not None and not processes.alone() and not isinstance(error, KEPT | Stopped):
            return  # other processes may not have this error, and a save needs all processes
        try:
            if isinstance(error, KEPT) and not self._evaluating:
                self._read()  # the state already includes this step
                if self.reached > self.first:
                    self._save()
            self.checkpoints.close()
            if isinstance(error, KEPT):  # this error is raised on all processes
                processes.barrier()
        except Fault as fault:
            if kind is None:
                raise
            self.run.say(f"{self.stage}: {fault}")  # the original error is the one to report
        finally:
            if self.run.stop is not None:
                self.run.stop.at_work = None
        if kind is None and (signal := self._signal()):
            raise self._stopped(signal)

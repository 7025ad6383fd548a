"""Records steps of a stage with jax's profiler."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.checkpoint.files import reason
from jaxrlhf.config import ProfileConfig
from jaxrlhf.distributed import processes


class StepProfiler:
    """Records the steps of `settings` into `folder`/profile/STAGE, on process 0.

    If `settings` is None, nothing is recorded. `done` is the number of steps that were done before the program started.
    The first step after a start compiles programs. It is recorded only if `settings` names step 1 as the first step. If
    a resumed run is past the named steps and has no complete recording, it records the same number of steps, from its
    second step. A complete recording is never replaced.
    """

    def __init__(
        self,
        settings: ProfileConfig | None,
        stage: str,
        folder: Path,
        done: int,
        total: int,
        say: Callable[[str], None],
    ):
        self._stage, self._say, self._running = stage, say, False
        self._target = folder / "profile" / stage
        self._temporary = self._target.with_name(f".{stage}.tmp")
        self._steps = range(0)
        if settings is None or settings.stage not in (None, stage) or not processes.is_first() or self._target.exists():
            return
        first, last = settings.steps
        start = first if first == 1 and not done else max(first, done + 2)
        self._steps = range(start, min(start + last - first, total) + 1)
        if not self._steps and settings.stage is not None:
            say(
                f"{stage}: no step is left to record for profile.steps={[first, last]}, because the stage has only "
                f"{total} steps"
            )

    def begin(self, step: int, state: Any) -> None:
        """Starts the recording if `step`, counted from 1, is the first step to record.

        First waits until `state` is computed.
        """
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            shutil.rmtree(self._temporary, ignore_errors=True)
            jax.profiler.start_trace(self._temporary)
            self._running = True
        if self._running:
            self._annotation = jax.profiler.StepTraceAnnotation(self._stage, step_num=step)
            self._annotation.__enter__()

    def end(self, step: int, state: Any) -> None:
        """Ends the recording after the last step, when `state` is computed. Prints how to open the recording."""
        if not self._running:
            return
        self._annotation.__exit__(None, None, None)
        if step < self._steps[-1]:
            return
        jax.block_until_ready(state)
        self._running = False
        try:
            jax.profiler.stop_trace()
            self._temporary.rename(self._target)
        except Exception as error:  # a run must not fail because of its recording
            self._say(f"{self._stage}: the profile could not be written: {reason(error)}; the run continues")
            return
        steps = f"step {step}" if len(self._steps) == 1 else f"steps {self._steps[0]} to {step}"
        traces = ", ".join(str(path) for path in self._target.rglob("*.trace.json.gz"))
        command = f"xprof --logdir {shlex.quote(str(self._target))}"
        self._say(
            f"{self._stage}: profile of {steps} in {self._target}; open it with: {command} "
            f"(pip install xprof), or open {traces or 'its trace'} at https://ui.perfetto.dev"
        )

    def close(self) -> None:
        """Discards an incomplete recording. A resumed run records the steps again."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            shutil.rmtree(self._temporary, ignore_errors=True)

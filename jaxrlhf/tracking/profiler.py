"""Records steps of a stage with jax's profiler."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.checkpoint.files import reason
from jaxrlhf.config import ProfileConfig
from jaxrlhf.distributed import processes


class StepProfiler:
    """Records the steps of `settings` into `folder`/profile/STAGE, on process 0. With `settings` None it does nothing.

    `done` is the number of steps before this start. The first step of a start compiles programs; it is recorded only
    if the recording is to begin at step 1. A resumed run that has passed the steps without a complete recording
    records as many steps after its first one. A complete recording is kept.
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
            say(f"{stage}: no step is left for profile.steps={[first, last]}: the stage has {total} steps")

    def begin(self, step: int, state: Any) -> None:
        """Starts the recording if step `step`, from 1, is the first one; waits until `state` has been computed."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            shutil.rmtree(self._temporary, ignore_errors=True)
            jax.profiler.start_trace(self._temporary)
            self._running = True
        if self._running:
            self._annotation = jax.profiler.StepTraceAnnotation(self._stage, step_num=step)
            self._annotation.__enter__()

    def end(self, step: int, state: Any) -> None:
        """Ends the recording after the last step, when `state` has been computed, and says how to open it."""
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
        except Exception as error:  # the steps are worth more than their recording
            self._say(f"{self._stage}: the profile could not be written: {reason(error)}; the run continues")
            return
        steps = f"step {step}" if len(self._steps) == 1 else f"steps {self._steps[0]} to {step}"
        traces = ", ".join(str(path) for path in self._target.rglob("*.trace.json.gz"))
        self._say(
            f"{self._stage}: profile of {steps} in {self._target}; open it with: xprof --logdir {self._target} "
            f"(pip install xprof), or open {traces or 'its trace'} at https://ui.perfetto.dev"
        )

    def close(self) -> None:
        """Discards an incomplete recording; a resumed run makes it again."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            shutil.rmtree(self._temporary, ignore_errors=True)

"""Many environments at once. If one raises or hangs, it is replaced, and only its own episode is lost."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrlhf.environments.protocol import name_of
from jaxrlhf.environments.workers import MODES, START_LIMIT, Factory, Failed
from jaxrlhf.errors import Fault, UserError, printable

MAX_FAILURES = 3  # failures of one environment without a whole episode between them; then it is retired


class Pool:
    """Environments that are stepped together. They are adapted to the current form, and may have any observations.

    A result is what the environment returned, or a `Failed` with the reason. After a failure the environment is
    replaced: the factory is called again, and the caller resets the new environment. If an environment fails
    `MAX_FAILURES` times before it finishes an episode, it is retired, and each call of it returns `Failed`. Each
    failure is reported with the environment's name. If all environments are retired, a `Fault` is raised.

    Args:
      factories: one function for each environment. The function returns the environment.
      mode: "sequential", "threads" or "processes".
      step_timeout: seconds per call of reset or step; None means no limit. A limit needs threads or processes.
        Another limit, one minute, holds for starting a thread or process together with its environment.
      names: for messages; by default "environment 0", ...
      report: receives (number of the environment, line) at each failure; None prints the line on stderr.
    """

    def __init__(
        self,
        factories: Sequence[Factory],
        mode: str = "sequential",
        step_timeout: float | None = None,
        names: Sequence[str] | None = None,
        report: Callable[[int, str], None] | None = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"mode: must be one of {', '.join(MODES)}, not {mode!r}")
        if step_timeout is not None and not step_timeout > 0:
            raise UserError(f"step_timeout: must be a number of seconds above 0, not {step_timeout!r}")
        if step_timeout is not None and mode == "sequential":
            raise UserError('step_timeout: needs mode="threads" or "processes"')
        if not factories:
            raise UserError("factories: give at least one function that makes an environment")
        self.factories, self.mode, self.step_timeout = list(factories), mode, step_timeout
        self.names = list(names or (f"environment {i}" for i in range(len(self.factories))))
        self._report = report or (lambda i, line: print(printable(line), file=sys.stderr, flush=True))
        self.failures = [0] * len(self.factories)
        self.workers: list[Any] = [None] * len(self.factories)
        for i in range(len(self.factories)):
            self._start(i)

    def __len__(self) -> int:
        return len(self.factories)

    def reset(self, seeds: Mapping[int, int | None], options: Mapping[int, Any] | None = None) -> dict[int, Any]:
        """Resets the environments that `seeds` names, and returns (observation, info) or `Failed` for each."""
        options = options or {}
        return self._call({i: ("reset", (), {"seed": seed, "options": options.get(i)}) for i, seed in seeds.items()})

    def step(self, actions: Mapping[int, Any]) -> dict[int, Any]:
        """Steps the environments that `actions` names, and returns five values or `Failed` for each."""
        return self._call({i: ("step", (action,), {}) for i, action in actions.items()})

    def get(self, i: int, *names: str) -> tuple[Any, ...]:
        """Returns attributes of environment i. Attributes that it does not have are None.

        Raises `UserError` if the environment cannot be made.
        """
        (result,) = self._call({i: ("get", names, {})}).values()
        if isinstance(result, Failed):
            raise UserError(f"{self.names[i]}: the environment cannot be made: {result}")
        return result

    def finished(self, i: int) -> None:
        """Forgets the failures of environment i, because it finished an episode."""
        self.failures[i] = 0

    def renew(self) -> None:
        """Forgets all failures, and makes retired environments again. One that cannot be made stays retired."""
        for i, worker in enumerate(self.workers):
            self.failures[i] = 0
            if worker is None:
                try:
                    self._start(i)
                except UserError as error:
                    self._report(i, str(error))

    def fail(self, i: int, reason: str) -> Failed:
        """Counts a failure of environment i, reports it, and replaces or retires the environment."""
        self.failures[i] += 1
        retired = self.failures[i] >= MAX_FAILURES
        what = f"it is retired after {MAX_FAILURES} failures" if retired else "its episode is lost, it is replaced"
        self._report(i, f"{self.names[i]}: {reason}; {what}")
        self._stop(i)
        if not retired:
            try:
                self._start(i)
            except UserError as error:
                self._report(i, f"{error}; it is retired")
        if all(worker is None for worker in self.workers):
            raise Fault(f"all environments have failed, the last with: {reason}")
        return Failed(reason)

    def close(self) -> None:
        """Closes all environments."""
        for i in range(len(self.workers)):
            self._stop(i)

    def _call(self, calls: dict[int, tuple[str, tuple[Any, ...], dict[str, Any]]]) -> dict[int, Any]:
        workers = self.workers
        results: dict[int, Any] = {}
        for i in calls:
            try:
                if workers[i] is None:
                    results[i] = Failed("retired")
                else:
                    workers[i].wait()
            except TimeoutError:
                results[i] = self.fail(i, f"it took more than {START_LIMIT:g} s to start")
            except Failed as error:
                results[i] = self.fail(i, f"it could not be started: {error}")
        for i, (method, arguments, options) in calls.items():
            if i not in results:
                workers[i].send(method, *arguments, **options)
        deadline = None if self.step_timeout is None else time.monotonic() + self.step_timeout
        for i in calls:
            if i in results:
                continue
            try:
                results[i] = workers[i].receive(deadline)
            except TimeoutError:
                results[i] = self.fail(i, f"{calls[i][0]} took more than {self.step_timeout:g} s")
            except Failed as error:
                results[i] = self.fail(i, f"{calls[i][0]} raised {error}")
        return results

    def _start(self, i: int) -> None:
        try:
            self.workers[i] = MODES[self.mode](self.factories[i], self.names[i])
        except UserError:
            raise
        except Exception as error:
            self.workers[i] = None
            raise UserError(f"{self.names[i]}: the environment cannot be made: {error}") from error

    def _stop(self, i: int) -> None:
        worker, self.workers[i] = self.workers[i], None
        if worker is not None:
            try:
                worker.stop()
            except Exception as error:
                self._report(i, f"{self.names[i]}: close raised {error}")


class Single:
    """One environment that exists already. The caller gets its exceptions unchanged, with their tracebacks."""

    def __init__(self, env: Any) -> None:
        self.env, self.names = env, [name_of(env)]

    def __len__(self) -> int:
        return 1

    def reset(self, seeds: Mapping[int, int | None], options: Mapping[int, Any] | None = None) -> dict[int, Any]:
        return {0: self.env.reset(seed=seeds[0], options=(options or {}).get(0))}

    def step(self, actions: Mapping[int, Any]) -> dict[int, Any]:
        return {0: self.env.step(actions[0])}

    def get(self, i: int, *names: str) -> tuple[Any, ...]:
        return tuple(getattr(self.env, name, None) for name in names)

    def finished(self, i: int) -> None:
        """Does nothing, because no failures are counted."""

    def fail(self, i: int, reason: str) -> Failed:
        raise UserError(f"{self.names[0]}: {reason}; jaxrlhf.check_env lists all problems")

    def close(self) -> None:
        close = getattr(self.env, "close", None)
        if callable(close):
            close()

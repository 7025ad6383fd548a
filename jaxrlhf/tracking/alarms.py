"""Alarms on metrics. Checks their conditions at each step, and starts the action of an alarm that begins."""

import dataclasses
import json
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.config.alarms import ADVICE, AlarmConfig
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.stopping import Stopped

TIME_LIMIT = 60.0  # seconds after which a command is ended
STATUS = 3  # exit status of a run that an alarm stops


class StoppedByAlarm(Stopped):
    """Raised when an alarm ends the run. The steps of the run are saved."""

    then = "change that alarm, and the same command continues the run"

    def __init__(self, what: str):
        Exception.__init__(self, what)
        self.status = STATUS


@dataclasses.dataclass
class State:
    """The state of an alarm: the values that it has seen. Checkpoints save this state."""

    latest: list[float] = dataclasses.field(default_factory=list)  # the last `over` values of the metric
    latest_against: list[float] = dataclasses.field(default_factory=list)  # the last values of the metric `against`
    extreme: float | None = None  # lowest or highest mean so far, for rises_by or falls_by
    extreme_against: float | None = None  # mean of `against` at the step of `extreme`
    beyond: int = 0  # number of values in a row beyond the limit
    within: int = 0  # number of values in a row within the limit
    first: int = 0  # step of the first of the values in a row beyond the limit
    active: bool = False


class Alarms:
    """The alarms of one stage.

    `saved` is the result of `notes` at the checkpoint from which the stage resumes. If an alarm was changed after that
    checkpoint, it is no longer active. It keeps the values that it has seen if `metric`, `against` and `over` are
    unchanged.
    """

    def __init__(
        self,
        stage: str,
        alarms: Mapping[str, AlarmConfig],
        saved: Mapping[str, Any],
        say: Callable[[str], None],
        run_dir: str = "",
    ):
        self.stage, self.alarms, self.say, self.run_dir = stage, alarms, say, run_dir
        self.states = {name: _restored(alarm, saved.get(name)) for name, alarm in alarms.items()}
        self.due: dict[str, str] = {}  # name -> message, for alarms that have begun and whose action is pause or stop
        self._commands: list[tuple[threading.Thread, list]] = []
        for name, alarm in alarms.items():
            if alarm.do == "stop" and self.states[name].active:
                self.due[name] = f"alarm {name} has stopped this run"

    @property
    def active(self) -> list[str]:
        """Returns the names of the alarms that are active now."""
        return [name for name, state in self.states.items() if state.active]

    def action(self) -> str | None:
        """Returns the action of the alarms that have begun: "stop", "pause" or None.

        All processes return the same action. They must agree on it, because an alarm on a time may begin on only one
        process.
        """
        asked = {self.alarms[name].do for name in self.due}
        number = 2 if "stop" in asked else len(asked)
        if not processes.alone() and any(alarm.do in ("pause", "stop") for alarm in self.alarms.values()):
            number = processes.largest(number)
        return (None, "pause", "stop")[number]

    def notes(self) -> dict[str, Any]:
        """Returns the state of all alarms, as JSON values."""
        return {
            name: {"alarm": _definition(self.alarms[name]), **dataclasses.asdict(state)}
            for name, state in self.states.items()
        }

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Takes the metrics of a step. For each alarm that begins, prints a line and starts the alarm's action.

        Returns the metrics alarm/NAME: 1 at each step at which the alarm is active, and 0 at the step at which it ends.
        """
        found = {}
        for name, alarm in self.alarms.items():
            state, value = self.states[name], metrics.get(alarm.metric)
            was = state.active
            if value is not None and value == value and (alarm.against is None or alarm.against in metrics):
                mean = _look(alarm, state, value, metrics.get(alarm.against), step)
                if state.active and not was:
                    self._begin(name, alarm, state, step, mean)
            if was or state.active:
                found[f"alarm/{name}"] = float(state.active)
        return found

    def _begin(self, name: str, alarm: AlarmConfig, state: State, step: int, mean: float) -> None:
        message = f"alarm {name}: {describe(alarm, state, mean)} since step {state.first}"
        self.say("; ".join(filter(None, (f"{self.stage}: {message}", ADVICE.get(name)))))
        if alarm.do in ("pause", "stop"):
            self.due[name] = message
        if alarm.do == "run" and processes.is_first():
            kind, limit = alarm.limit
            facts = {
                "alarm": name, "stage": self.stage, "step": step, "since": state.first, "metric": alarm.metric,
                "value": mean, kind: limit, "over": alarm.over, "for": alarm.for_, "run_dir": self.run_dir,
                "message": f"{self.stage}: {message}",
            }  # fmt: skip
            self._start(name, alarm.command, json.dumps(facts))

    def _start(self, name: str, command: tuple[str, ...], text: str) -> None:
        running: list[subprocess.Popen] = []
        thread = threading.Thread(target=self._run, args=(name, command, text, running), daemon=True)
        thread.start()
        self._commands.append((thread, running))

    def _run(self, name: str, command: tuple[str, ...], text: str, running: list) -> None:
        """Runs a command to its end. Prints a line if the command fails."""
        where = f"{self.stage}: alarm {name}: command {command[0]}"
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        try:
            with subprocess.Popen(command, text=True, errors="replace", **quiet) as process:
                running.append(process)
                try:
                    _, errors = process.communicate(text, TIME_LIMIT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    self.say(f"{where} took more than {TIME_LIMIT:g} s and was ended")
                    return
            if process.returncode > 0:
                last = (errors.strip().splitlines() or ["no message"])[-1][:200]
                self.say(f"{where} failed with status {process.returncode}: {last}")
        except (OSError, ValueError) as error:
            self.say(f"{where} cannot be started: {getattr(error, 'strerror', None) or error}")

    def close(self, wait: bool = True) -> None:
        """Waits until running commands end, at most until their time limit.

        If `wait` is false, ends the commands instead.
        """
        for thread, running in self._commands:
            if not wait:
                for process in running:
                    process.terminate()
            thread.join(TIME_LIMIT + 5 if wait else 1)


def _look(alarm: AlarmConfig, state: State, value: float, against: float | None, step: int) -> float:
    """Updates the state with the value of a step. Returns the mean that is compared with the limit."""
    state.latest = [*state.latest, value][-alarm.over :]
    mean = sum(state.latest) / len(state.latest)
    if against is not None:
        state.latest_against = [*state.latest_against, against][-alarm.over :]
    if len(state.latest) < alarm.over:
        return mean
    if _is_beyond(alarm, state, mean):
        state.first = state.first if state.beyond else step
        state.beyond, state.within = state.beyond + 1, 0
    else:
        state.beyond, state.within = 0, state.within + 1
    state.active = state.within < alarm.for_ if state.active else state.beyond >= alarm.for_
    return mean


def _is_beyond(alarm: AlarmConfig, state: State, mean: float) -> bool:
    kind, limit = alarm.limit
    if kind == "above":
        return mean > limit
    if kind == "below":
        return mean < limit
    sign = 1 if kind == "rises_by" else -1
    against = sum(state.latest_against) / len(state.latest_against) if state.latest_against else None
    if state.extreme is None or sign * (mean - state.extreme) <= 0:
        state.extreme, state.extreme_against = mean, against
        return False
    least = abs(state.extreme) * float(limit[:-1]) / 100 if isinstance(limit, str) else limit
    opposite = against is None or sign * (against - state.extreme_against) < 0
    return sign * (mean - state.extreme) > least and opposite


def describe(alarm: AlarmConfig, state: State, mean: float) -> str:
    """Returns the value and the limit as text, such as "kl/k1 is 31.2, above 30"."""
    kind, limit = alarm.limit
    number = limit if isinstance(limit, str) else f"{limit:g}"
    value = f"{alarm.metric} is {mean:.3g}" + f" (mean of {alarm.over} values)" * (alarm.over > 1)
    if not alarm.changes:
        return f"{value}, {kind} {number}"
    word, other = ("above its lowest", "lower") if kind == "rises_by" else ("below its highest", "higher")
    against = f", while {alarm.against} is {other} than at that value," if alarm.against else ""
    return f"{value}, more than {number} {word}, {state.extreme:.3g}{against}"


def _definition(alarm: AlarmConfig) -> dict[str, Any]:
    return alarm.model_dump(mode="json", by_alias=True)


def _restored(alarm: AlarmConfig, saved: Mapping[str, Any] | None) -> State:
    if saved is None:
        return State()
    values = dict(saved)
    before, now = values.pop("alarm"), _definition(alarm)
    if before == now:
        return State(**values)
    if any(before[key] != now[key] for key in ("metric", "against", "over")):
        return State()
    seen = {key: values[key] for key in ("latest", "latest_against")}
    if (before["rises_by"] is None, before["falls_by"] is None) == (now["rises_by"] is None, now["falls_by"] is None):
        seen |= {key: values[key] for key in ("extreme", "extreme_against")}
    return State(**seen)

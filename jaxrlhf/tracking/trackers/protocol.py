"""The interface of a tracker, and the records that a tracker receives."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

PROJECT = "jaxrlhf"  # name of the project or experiment, unless the service's environment variable sets one


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The run that a tracker shows."""

    folder: Path  # the run directory, absolute
    settings: dict[str, Any]  # the settings of config.yaml, nested
    settings_text: str  # the text of config.yaml
    process: int  # process id of the run

    @property
    def name(self) -> str:
        return self.folder.name


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl with the samples that belong to it.

    If samples were written after their line was sent, they come in another `Line` with the same number and without
    metrics.
    """

    number: int  # number of the line in metrics.jsonl, from 1; trackers use it as the step
    time: float  # Unix time, in seconds
    metrics: dict[str, float]  # metrics by name; NaN if the log has null
    tables: dict[str, list[dict[str, Any]]]  # samples by name: rows of texts and numbers


class Tracker(Protocol):
    """A service that shows runs. If a method raises an exception, nothing more is sent to the service.

    `ids` identifies the run in the service. It is saved in the run directory, and is passed to `open` when the run
    resumes. After `open`, `where` is a text that says where the user finds the run.
    """

    ids: dict[str, Any]
    where: str

    def open(self, run: RunInfo, ids: dict[str, Any]) -> int:
        """Creates a run in the service, or continues the run of `ids`.

        Returns the number of the last line that the service already has.
        """

    def log(self, line: Line) -> None:
        """Sends a line. The numbers of lines never decrease."""

    def close(self, finished: bool) -> None:
        """Sends all lines that are still buffered. `finished` is false if the run can be resumed."""


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the settings as key path -> value. A key path is a name such as `ppo.kl.coef`."""
    paths: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{above}.{name}" if above else name
        paths |= flat(value, path) if isinstance(value, dict) and value else {path: value}
    return paths

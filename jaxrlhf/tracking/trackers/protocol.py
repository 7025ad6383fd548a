"""What a tracker must do, and the records that it receives."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

PROJECT = "jaxrlhf"  # project, or experiment, unless the service's own environment variable names another


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The run that a tracker shows."""

    folder: Path  # the run directory, absolute
    settings: dict[str, Any]  # of config.yaml, nested
    settings_text: str  # config.yaml
    process: int  # process id of the run

    @property
    def name(self) -> str:
        return self.folder.name


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl with the samples that belong to it.

    If the samples were written after the line was logged, they come alone: `metrics` is empty.
    """

    number: int  # of the line in metrics.jsonl, from 1: the step in every tracker
    time: float  # Unix time, in seconds
    metrics: dict[str, float]  # by name; NaN where the log has null
    tables: dict[str, list[dict[str, Any]]]  # samples by name: rows of texts and numbers


class Tracker(Protocol):
    """A service that shows runs. Any method may raise an exception, which ends tracking by this service.

    `ids` says which run of the service it is; it is kept in the run directory, and `open` gets it when the run resumes.
    `where` says, after `open`, where a user finds the run.
    """

    ids: dict[str, Any]
    where: str

    def open(self, run: RunInfo, ids: dict[str, Any]) -> int:
        """Creates the service's run, or continues that of `ids`. Returns the number of the last line that it has."""

    def log(self, line: Line) -> None:
        """Sends a line. Numbers increase."""

    def close(self, finished: bool) -> None:
        """Sends what is still buffered. `finished` is false if the run can be resumed."""


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by key path, such as `ppo.kl.coef`."""
    paths: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{above}.{name}" if above else name
        paths |= flat(value, path) if isinstance(value, dict) and value else {path: value}
    return paths

"""Reads run directories for a report: metrics as columns, samples, settings, results.

A run may be unfinished, killed or from an older version. Invalid lines are skipped and counted. If a file is missing,
its part of the report is empty.
"""

import datetime
import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint.files import reason
from jaxrlhf.config.reading import parse_yaml
from jaxrlhf.errors import UserError

STAGES = ("sft", "reward_model", "ppo")
POINTS = 800  # largest number of points of a curve; a longer curve is averaged over equal parts
MOST_SAMPLES = 60  # largest number of lines of samples.jsonl in a report: the first, the last, and some between
MOST_BYTES = 3_000_000  # largest size of these lines; a line with completions of 1000 tokens takes 400 kB
UNSHOWN = {"run_dir", "compilation_cache"}  # settings that do not change results
SEED = "seed"


def read_run(folder: Path) -> dict[str, Any]:
    """Returns everything that a report shows of a run, as values for JSON.

    Raises `UserError` if the folder has neither log nor settings of a run, or if a file cannot be read.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise UserError(f"{folder}: has neither metrics.jsonl nor config.yaml; give the directory of a run")
    try:
        metrics, unread = _lines(folder / "metrics.jsonl")
        samples, more = _lines(folder / "samples.jsonl")
        settings = _settings(_text(folder / "config.yaml"))
        finished = _finished(folder / "roles" / "finished.json")
        changed = max((path.stat().st_mtime for path in folder.glob("*.jsonl")), default=None)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {reason(error)}") from None
    return {
        "name": folder.name,
        "folder": str(folder),
        "settings": settings,
        "stages": {stage: _stage(stage, metrics, settings, finished) for stage in _stages(metrics, settings)},
        "samples": _thinned([line for line in samples if line["stage"] == "ppo"]),
        "calibration": [line for line in samples if "calibration" in line or "margins" in line][-20:],
        "finished": finished,
        "unread": unread + more,
        "changed": changed and datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat(timespec="seconds"),
    }


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns (valid lines of a log, number of invalid lines).

    Text after the last newline is not counted as invalid.
    """
    *complete, rest = _text(path).split("\n")
    found, unread = [], 0
    for line in (*complete, rest):
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN and infinities become None
            valid = isinstance(record["stage"], str) and isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if valid:
            found.append(record)
        elif line is not rest and line.strip():
            unread += 1
    return found, unread


@functools.lru_cache(maxsize=32)  # a run that trains reads its settings at every refresh of its report
def _settings(text: str) -> dict[str, Any]:
    """Returns the settings as a flat table, such as {"ppo.kl.coef": 0.05}; empty if they are not valid YAML."""
    try:
        return dict(_flat(parse_yaml(text, "config.yaml"), ""))
    except UserError:
        return {}


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, value if isinstance(value, bool | int | float | str | None) else json.dumps(value, default=str)


def _finished(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}", parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _stages(metrics: Iterable[dict], settings: dict[str, Any]) -> list[str]:
    """Returns the stages that have lines or that the settings name."""
    named = {line["stage"] for line in metrics}
    named |= {stage for stage in STAGES if f'"{stage}"' in str(settings.get("stages"))}
    return sorted(named, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage))


def _stage(stage: str, metrics: list[dict], settings: dict[str, Any], finished: dict) -> dict[str, Any]:
    """Returns the steps and curves of a stage: {"metrics": {name: {"x": steps, "y": numbers}}, ...}."""
    lines = [line for line in metrics if line["stage"] == stage]
    passed = bool(metrics) and metrics[-1]["stage"] != stage and bool(lines)  # a later stage has begun
    names = dict.fromkeys(name for line in lines for name, value in line.items() if _number(value))
    total = settings.get("ppo.iterations") if stage == "ppo" else None
    return {
        "step": lines[-1]["step"] if lines else 0,
        "total": total if isinstance(total, int) else None,
        "finished": stage in finished or passed,
        "seconds": sum(line["seconds"] for line in lines if _number(line.get("seconds"))),
        "metrics": {name: _curve(lines, name) for name in names if name != "step"},
        "alarms": [alarm for name in names if name.startswith("alarm/") and (alarm := _alarm(lines, name))],
    }


def _alarm(lines: list[dict], name: str) -> dict[str, Any]:
    """First and last step in which an alarm held, and how many times it began; empty if it never held."""
    holds = [_number(line.get(name)) and line[name] > 0 for line in lines]
    steps = [line["step"] for line, held in zip(lines, holds) if held]
    if not steps:
        return {}
    times = sum(now and not before for before, now in zip([False, *holds], holds))
    return {"name": name.removeprefix("alarm/"), "first": steps[0], "last": steps[-1], "times": times}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(lines: list[dict], name: str) -> dict[str, Any]:
    """Returns steps and values of a metric. A value of a long curve is the mean of "every" logged values."""
    found = [(line["step"], line[name]) for line in lines if _number(line.get(name))]
    every = -(-len(found) // POINTS)
    parts = [found[i : i + every] for i in range(0, len(found), every)] if found else []
    x = [part[-1][0] for part in parts]
    y = [float(f"{sum(value for _, value in part) / len(part):.5g}") for part in parts]
    return {"x": x, "y": y, "every": every}


def _thinned(lines: list[dict]) -> list[dict]:
    """Returns the lines of samples for a report.

    The limits apply to training samples and to all other lines separately.
    """
    training = [line for line in lines if "samples" in line]
    others = [line for line in lines if "samples" not in line]
    return [*_spaced(training), *_spaced(others)]


def _spaced(lines: list[dict]) -> list[dict]:
    size = max((len(json.dumps(line)) for line in lines[:1] + lines[-1:]), default=1)
    most = max(2, min(MOST_SAMPLES, MOST_BYTES // size))
    if len(lines) <= most:
        return lines
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]

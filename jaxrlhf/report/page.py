"""Builds the report: one HTML file that holds its data, styles, scripts and the plotting library.

The file loads nothing, and its content security policy forbids requests. All text from models, data and settings is
JSON in a script element that the browser does not run. The page's script adds this text to the document as text, never
as HTML.
"""

import base64
import datetime
import functools
import gzip
import html
import importlib.util
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint.files import atomic_write, reason
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.report.health import warnings
from jaxrlhf.report.reading import SEED, UNSHOWN, read_run

SCRIPTS = ("elements.js", "charts.js", "panels.js", "samples.js", "main.js")
MARK = 'content="jaxrlhf report"'  # in the first lines of every report
NAMED = 3  # largest number of settings in the name of a group of runs


def write_report(folders: Sequence[Path], path: Path) -> list[str]:
    """Writes the report of one or several runs. Returns a warning for each run whose logs have invalid lines.

    Raises `UserError` if a run cannot be read or `path` cannot be used, and `Fault` if the report cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    _check_target(path)
    page = build(runs)
    try:
        atomic_write(path, page)
    except OSError as error:
        raise Fault(f"{path}: cannot be written: {reason(error)}") from error
    unread = {run["folder"]: run["unread"] for run in runs if run["unread"]}
    return [f"{folder}: {lines} lines of the logs cannot be read and are left out" for folder, lines in unread.items()]


def _check_target(path: Path) -> None:
    """Raises `UserError` if `path` is a folder, its folder does not exist, or it is a file that is not a report."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; give a file")
    if path.is_file() and path.stat().st_size and MARK not in path.read_bytes()[:4000].decode("utf-8", "replace"):
        raise UserError(f"{path}: this file is not a report; remove it, or give another file")


def build(runs: list[dict[str, Any]]) -> str:
    """Returns the page of runs that `read_run` has read."""
    _name(runs)
    table, groups = _settings_table(runs), _groups(runs)
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shown = [{key: value for key, value in run.items() if key != "settings"} for run in runs]
    for run, own in zip(shown, runs):
        run["warnings"] = warnings(own)
    data = {"made": made, "runs": shown, "groups": groups, "settings": table}
    names = ", ".join(run["name"] for run in runs)
    parts = {
        "title": html.escape(f"{names} · jaxrlhf report"),
        "style": _asset("style.css"),
        "data": embedded(data),
        "library": _library(),
        "script": "\n".join(_asset(name) for name in SCRIPTS),
    }
    page = _asset("page.html")
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:]))


def embedded(data: Any) -> str:
    """Returns JSON that is safe inside a script element: no text in the JSON can end the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _name(runs: list[dict[str, Any]]) -> None:
    """Gives runs distinct names: the name of the folder, with its parents or a number if needed."""
    for depth in (1, 2, 3):
        for run in runs:
            run["name"] = "/".join(Path(run["folder"]).parts[-depth:])
        if len({run["name"] for run in runs}) == len(runs):
            return
    for number, run in enumerate(runs, start=1):
        run["name"] += f" ({number})"


def _settings_table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per setting: the key, the value in each run, and whether the values differ."""
    keys = dict.fromkeys(key for run in runs for key in run["settings"])
    rows = [{"key": key, "values": [_text(run["settings"], key) for run in runs]} for key in keys]
    return [row | {"differs": len(set(row["values"])) > 1} for row in rows]


def _text(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return "—"
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value)


def _groups(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns groups of runs, {"label", "runs": indices}. Runs with equal settings, except the seed, are one group."""
    found: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        own = {key: value for key, value in run["settings"].items() if key not in {*UNSHOWN, SEED}}
        found.setdefault(json.dumps(own, sort_keys=True) if own else f"run {index}", []).append(index)
    first = [runs[indices[0]]["settings"] for indices in found.values()]
    keys = dict.fromkeys(key for settings in first for key in settings if key not in {*UNSHOWN, SEED})
    differing = [key for key in keys if len({_text(settings, key) for settings in first}) > 1]
    groups = []
    for settings, indices in zip(first, found.values()):
        label = ", ".join(f"{key}={_text(settings, key)}" for key in differing[:NAMED])
        if len(differing) > NAMED or not label:
            label = runs[indices[0]]["name"]
        groups.append({"label": label + (f" ({len(indices)} seeds)" if len(indices) > 1 else ""), "runs": indices})
    return groups


def _asset(name: str) -> str:
    return (files("jaxrlhf.report") / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def _library() -> str:
    """Returns Plotly's bundle, compressed to 2 MB instead of 4.8 MB. The browser unpacks it."""
    package = importlib.util.find_spec("plotly")  # finds the package without importing it
    if package is None:
        raise UserError("plotly is not installed; run pip install plotly")
    bundle = Path(package.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(bundle.read_bytes(), compresslevel=5, mtime=0)).decode("ascii")

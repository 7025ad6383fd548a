"""The report of an evaluation as text: tables of metrics with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.evaluation.probabilities import at_limit

LABELS = {
    "reward/score": "reward",
    "reward/gold": "gold score",
    "kl/k1": "KL to the reference, nats",
    "length/mean": "tokens",
    "length/eos_share": "share that ended",
    "text/loss": "loss on text, nats per token",
    "text/perplexity": "perplexity on text",
}
WIDEST = 12  # largest number of columns of a confusion matrix in the table
Bounds = Mapping[str, float | None]


def table(report: Mapping[str, Any]) -> str:
    """Returns the report as lines of text. Each role is a column, and each metric is a row."""
    lines = [f"{report['origin']}: {_measured_on(report)}", ""]
    lines += _block("", report["roles"])
    if report["temperatures"]:
        of_roles = ", ".join(f"{role} {_number(value, False)}" for role, value in report["temperatures"].items())
        lines += ["", f"temperatures of the calibrated probabilities: {of_roles}"]
        if limits := [role for role, value in report["temperatures"].items() if at_limit(value)]:
            lines += [
                f"the temperature of {', '.join(limits)} is at the limit of its range, so its calibrated probabilities "
                "mean nothing: --calibrate has too few rows, or the role is right, or ignorant, on all of them"
            ]
    if report["differences"]:
        lines += ["", "differences of the same rows", *_block("", report["differences"], signed=True)]
    if report["win_rates"]:
        judges = list(next(iter(report["win_rates"].values())))
        for judge in judges:
            lines += ["", f"by {judge}", *_block("", {pair: of[judge] for pair, of in report["win_rates"].items()})]
    for role, confusion in report["confusion"].items():
        lines += ["", f"{role}: labels (rows) by answers (columns)", *_confusion(confusion)]
    return "\n".join(lines) + "\n"


def _measured_on(report: Mapping[str, Any]) -> str:
    parts = [f"{report[kind]['rows']} {what} of {report[kind]['path']}"
             for kind, what in (("prompts", "prompts"), ("text", "texts")) if report[kind]]  # fmt: skip
    if report["prompts"] and report["samples_per_prompt"] > 1:
        parts[0] += f" ({report['samples_per_prompt']} completions each)"
    interval = report["interval"]
    method = {"bca": "BCa", "percentile": "percentile"}[interval["interval"]]
    ends = f"{interval['confidence']:g}% {method} bootstrap intervals of {interval['resamples']} resamples"
    return f"{', '.join(parts)}; {ends}"


def _block(title: str, columns: Mapping[str, Mapping[str, Bounds]], signed: bool = False) -> list[str]:
    """Returns the lines of a table with one metric per row. Metrics are in the order of their first column."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    cells = [[_cell(metrics.get(name), signed) for metrics in columns.values()] for name in names]
    return _aligned([[title, *columns], *([LABELS.get(name, name), *row] for name, row in zip(names, cells))])


def _cell(bounds: Bounds | None, signed: bool) -> str:
    if bounds is None or bounds["value"] is None:
        return "-"
    numbers = [_number(bounds[key], signed and key == "value") for key in ("value", "low", "high")]
    return numbers[0] if bounds["low"] is None else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _number(value: float | None, signed: bool) -> str:
    if value is None:
        return "-"
    digits = 0 if value == 0 else 4 if abs(value) < 1 else 3 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}"


def _confusion(confusion: Mapping[str, Any]) -> list[str]:
    labels = confusion["labels"]
    if len(labels) > WIDEST:
        return [f"{len(labels)} labels; --json has the matrix"]
    rows = [[label, *map(str, counts)] for label, counts in zip(labels, confusion["counts"])]
    return _aligned([["", *labels, "(none)"], *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines in which each column has one width. The first column is left-aligned, others are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]

"""A reward that runs the code of a completion against unit tests of its row, in a sandbox. See `sandbox.pool`."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.errors import UserError, one_line
from jaxrlhf.rewards.completions import Completions, with_abstained
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.sandbox.running import PATIENCE, SandboxPool
from jaxrlhf.rewards.sandbox.unit_tests import count_tests

FENCED = re.compile(r"```[^\S\n]*(?:python|py|python3)?[^\S\n]*\n(.*?)(?:\n[^\S\n]*```|\Z)", re.DOTALL | re.IGNORECASE)


class CodeTestsReward:
    """A reward (see `completions.Reward`): the share of the row's tests that the completion's Python code passes.

    The code is that of the last Markdown code block, or the whole completion. A row whose tests are None has no score,
    and neither has a completion that was not tested within `batch_seconds`. Raises `UserError` if no sandbox works.
    `say` receives a line if the sandbox is not bubblewrap.
    """

    name, may_abstain = "code_tests", True

    def __init__(self, config: CodeTestsRewardConfig, key_path: str, say: Callable[[str], None] | None = None):
        self.config = config
        self.sandbox = SandboxPool(config, key_path, say)

    def check_rows(self, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]], key_path: str) -> None:
        """Raises `UserError` if the tests of a row cannot be used."""
        config = self.config
        rows = [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows)]
        for setting in ("column", "prefix", "entry_point"):
            name = getattr(config, setting)
            if name is not None and not any(name in row for row in rows):
                present = ", ".join(sorted(set().union(*rows))) or "none"
                raise UserError(f"{key_path}.{setting}: the data has no column {name}; the columns are: {present}")
        for number, row in enumerate(rows, 1):
            try:
                self._job("", row)
            except ValueError as error:
                raise UserError(f"{key_path}.column: prompt {number}: {one_line(error)}") from None

    def __call__(self, completions: Completions) -> np.ndarray:
        count = len(completions.prompts)
        jobs = {}
        for number, (prompt, text, row) in enumerate(zip(completions.prompts, completions.texts, completions.rows)):
            try:
                job = self._job(text, {"prompt": prompt, **row})
            except ValueError as error:
                raise RewardFault(f"reward code_tests: row {number}: {one_line(error)}") from None
            if job is not None:
                jobs[number] = job
        scores, abstained = np.zeros(count, np.float32), np.ones(count, bool)
        for row, score in zip(jobs, self._scores(list(jobs.values()))):
            if score is not None:
                scores[row], abstained[row] = score, False
        return with_abstained(scores, abstained)

    def _scores(self, jobs: list[dict[str, Any]]) -> list[float | None]:
        if not jobs:
            return []
        workers = min(self.config.workers or len(os.sched_getaffinity(0)), len(jobs))
        limit = self.config.batch_seconds
        request = {"jobs": jobs, "workers": workers, "batch_seconds": limit}
        scores: list[float | None] = [None] * len(jobs)
        for line in self.sandbox.run(request, limit + self.config.seconds + PATIENCE):
            if "error" in line:
                raise RewardFault(f"reward code_tests: {line['error']}")
            share = line["passed"] / line["total"] if line["total"] else 0.0
            scores[line["job"]] = float(share == 1) if self.config.score == "all" else share
        return scores

    def _job(self, text: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the job of a completion, None if the row has no tests. Raises ValueError if they cannot be used."""
        config = self.config
        if row.get(config.column) is None:
            return None
        entry_point = None if config.entry_point is None else row.get(config.entry_point)
        if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
            raise ValueError(f"the column {config.entry_point} must hold the name of a function, not {entry_point!r}")
        prefix = None if config.prefix is None else row.get(config.prefix)
        if prefix is not None and not isinstance(prefix, str):
            raise ValueError(f"the column {config.prefix} must hold text, not a {type(prefix).__name__}")
        tests = read_tests(row[config.column], config.column, entry_point)
        # Completions of text prompts often begin with a blank, which would be an indentation error.
        code = code_of(text).lstrip() if prefix is None else prefix + code_of(text)
        return tests | {"code": code, "entry_point": entry_point}


def code_of(completion: str) -> str:
    """Returns the last Markdown code block of a completion, or the whole completion."""
    blocks = FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def read_tests(value: Any, column: str, entry_point: str | None = None) -> dict[str, Any]:
    """Returns {"sources": texts} or {"examples": [{"input", "output"}]}. Raises ValueError for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict) and all(isinstance(value.get(name), (list, tuple)) for name in ("input", "output")):
        value = [{"input": given, "output": wanted} for given, wanted in zip(value["input"], value["output"])]
    value = [value] if isinstance(value, (str, dict)) else value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        if not all(isinstance(item.get(name), str) for item in value for name in ("input", "output")):
            raise ValueError(f"the column {column} must have a text input and a text output in each example")
        return {"examples": [{name: item[name] for name in ("input", "output")} for item in value]}
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f"the column {column} must hold Python text, a list of asserts or a list of {{input, output}}")
    try:
        if not count_tests(value, entry_point):
            raise ValueError(f"the column {column} has no assert and no test function")
    except SyntaxError as error:
        raise ValueError(f"the column {column} is not Python: line {error.lineno}: {error.msg}") from None
    return {"sources": list(value)}

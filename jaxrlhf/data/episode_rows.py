"""Rows for an environment. A row reaches `reset` as options; nothing of it is tokenized here."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import PromptsConfig, PromptsSourceConfig
from jaxrlhf.data.mixture import Reader, mixed
from jaxrlhf.data.order import batch_rows, checksum
from jaxrlhf.data.report import LoadReport, drops_unusable
from jaxrlhf.data.sources import Row
from jaxrlhf.data.templates import template_writer


@dataclass(frozen=True)
class EpisodeRows:
    """The rows of episodes, in the order of the data. Without data there is one empty row."""

    columns: list[dict[str, Any]]
    report: LoadReport | None = None
    success: None = None  # the curriculum by success, which environments do not have

    def __len__(self) -> int:
        return len(self.columns)

    def checksum(self) -> str:
        """Returns a hash of the rows in this order."""
        return checksum([np.frombuffer(json.dumps(self.columns, sort_keys=True, default=str).encode(), np.uint8)])

    def rows(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Returns the row numbers, i64[batch_size], at a step of an endless shuffled stream."""
        return batch_rows(seed, step, batch_size, len(self))


def load_episode_rows(config: PromptsConfig | None) -> EpisodeRows:
    """Reads the rows of the sources, with the fields that templates write. Raises UserError if a row has a fault."""
    if config is None:
        return EpisodeRows([{}])
    columns, report = mixed([config, *config.mix_with], _reader)
    return EpisodeRows(columns, report)


def _reader(config: PromptsSourceConfig) -> Reader[dict[str, Any]]:
    drop = drops_unusable(config, "stop")
    write = template_writer(config, drop)

    def read(rows: list[Row], first: int = 0) -> tuple[list[dict[str, Any]], LoadReport]:
        report = LoadReport(config.path, len(rows))
        usable = report.usable(write(rows, first), lambda row: row.values, drop)
        return [values for _, values in usable], report

    return read

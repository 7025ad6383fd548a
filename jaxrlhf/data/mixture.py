"""Mixtures of several sources: how often each row of each source appears in a pass over the data."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from jaxrlhf.config import ChatSourceConfig
from jaxrlhf.data.order import epoch_order
from jaxrlhf.data.report import LoadReport
from jaxrlhf.data.sources import Row, read_rows
from jaxrlhf.errors import UserError

_LARGEST = 100_000_000  # rows of a pass over a mixture
_STREAM = 100  # stream of `epoch_order` for the rows that appear once more than the others, + the number of the source
T = TypeVar("T")


class Reader(Protocol[T]):
    """Checks and tokenizes rows of one source. The first call decides which fields are read in all calls."""

    def __call__(self, rows: list[Row], first: int = 0) -> tuple[list[T], LoadReport]:
        """Returns (items, report). `first` is the number of the first of these rows in the source."""


def mixed(
    sources: Sequence[ChatSourceConfig], reader_of: Callable[[ChatSourceConfig], Reader[T]]
) -> tuple[list[T], LoadReport]:
    """Reads each source, and returns (items of a pass over the mixture, report on all sources).

    The items are in the order of the sources, and batches shuffle them later. An item that appears several times is the
    same object. Raises UserError if a source has no row that can be used.
    """
    loaded = []
    for source in sources:
        items, report = reader_of(source)(read_rows(source))
        report.check()
        loaded.append((items, report))
    counts = [len(items) for items, _ in loaded]
    chosen = repeats([source.weight for source in sources], [source.epochs for source in sources], counts)
    items = [items[i] for (items, _), rows in zip(loaded, chosen) for i in rows]
    report = LoadReport.joined([report for _, report in loaded], [len(rows) for rows in chosen])
    return items, report


def repeats(
    weights: Sequence[float | None], epochs: Sequence[float | None], counts: Sequence[int]
) -> list[np.ndarray]:
    """Returns the row numbers of each source in a pass, i64[n_i], in ascending order.

    A source with `counts` c and epochs e has round(e * c) rows in a pass. Each row appears floor(e) or floor(e) + 1
    times. The rows that appear once more are a random choice, which is the same in every pass. Weights w give the
    epochs e = a * w / c. The constant a makes the smallest e 1, so that a pass has every row at least once. Raises
    UserError if a pass would have more rows than memory is likely to hold.
    """
    if weights[0] is not None:
        relative = [weight / count for weight, count in zip(weights, counts)]
        epochs = [value / min(relative) for value in relative]
    totals = [max(1, round((1.0 if epoch is None else epoch) * count)) for epoch, count in zip(epochs, counts)]
    if sum(totals) > _LARGEST:
        raise UserError(
            f"a pass over the mixture would have {sum(totals):,} rows, but at most {_LARGEST:,} are allowed; give "
            "weights or epochs that repeat rows less often"
        )
    chosen = []
    for number, (total, count) in enumerate(zip(totals, counts)):
        extra = epoch_order(0, 0, count, stream=_STREAM + number)[: total % count]
        chosen.append(np.sort(np.concatenate([np.tile(np.arange(count), total // count), extra])))
    return chosen

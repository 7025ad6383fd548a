"""Which rows make which batch: shuffles and length buckets as pure functions of seed and step.

Nothing here is advanced or saved: the place in the data is the step, and a run that resumes at a step gets
the batch that it would have had.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int, count: int, stream: int = 0) -> np.ndarray:
    """A permutation of range(count), i64[count], read-only. `stream` separates uses that share seed and epoch.

    Sorted raw Philox words instead of `Generator.permutation`: numpy promises the bits of a bit generator
    for ever, those of a generator's methods only within a version.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(count)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Row indices i64[batch_size] of one batch of an endless shuffled stream: each row once an epoch.

    A batch may straddle epochs, and holds a row twice only then. Needs count >= 1.
    """
    if count < 1:
        raise ValueError("batch_rows needs at least one row")
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    return np.concatenate(
        [epoch_order(seed, int(epoch), count)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )


def hold_out(count: int, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(count) at random into rows to train on and rows held out: `wanted`, at most a tenth of all."""
    order = epoch_order(seed, 0, count, stream=2)
    held = min(wanted, count // 10)
    return np.sort(order[held:]), np.sort(order[:held])


def checksum(rows: Iterable[np.ndarray]) -> str:
    """Tells these arrays, in this order, from others: 64 bits in hex."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        found.update(len(row).to_bytes(8, "little"))
        found.update(row.tobytes())
    return found.hexdigest()


def bucket_lengths(lengths: np.ndarray, buckets: int, max_length: int, multiple: int = 8) -> np.ndarray:
    """At most `buckets` padded lengths, ascending: the quantiles of i64[N] `lengths`, rounded up to `multiple`
    and cut at `max_length`, so that about as many rows fall into each and every row fits the last."""
    levels = np.quantile(lengths, np.arange(1, buckets + 1) / buckets, method="inverted_cdf")
    return np.unique(np.minimum(-(-levels // multiple) * multiple, max_length)).astype(np.int64)


@dataclass(frozen=True)
class Buckets:
    """Rows sorted into lengths, and the batches of each epoch: rows of one length, in an order of its own.

    Each epoch shuffles the rows of each bucket, cuts them into batches (the last of a bucket may be short)
    and shuffles the batches. The number of batches is the same in every epoch.
    """

    members: tuple[np.ndarray, ...]  # rows of each bucket, i64[n]
    lengths: tuple[int, ...]  # padded length of each bucket
    batch_size: int

    @classmethod
    def of(cls, row_lengths: np.ndarray, bounds: np.ndarray, batch_size: int) -> "Buckets":
        """Puts each row into the first of the ascending `bounds` that holds it; empty buckets vanish."""
        place = np.searchsorted(bounds, row_lengths)
        if len(place) and place.max() >= len(bounds):
            raise ValueError(f"a row of {row_lengths.max()} tokens fits none of the lengths {bounds.tolist()}")
        used = np.unique(place)
        return cls(tuple(np.flatnonzero(place == i) for i in used), tuple(int(bounds[i]) for i in used), batch_size)

    def _plan(self) -> list[tuple[int, int]]:
        """(bucket, batch within it) of all batches of an epoch, unshuffled."""
        return [(b, i) for b, rows in enumerate(self.members) for i in range(-(-len(rows) // self.batch_size))]

    def __len__(self) -> int:
        """Batches per epoch."""
        return sum(-(-len(rows) // self.batch_size) for rows in self.members)

    def batch(self, seed: int, step: int) -> tuple[int, np.ndarray]:
        """Padded length and rows, i64[<= batch_size], of the batch at `step`."""
        epoch, place = divmod(step, len(self))
        bucket, index = self._plan()[epoch_order(seed, epoch, len(self), stream=1)[place]]
        members = self.members[bucket]
        order = epoch_order(seed, epoch, len(members), stream=3 + bucket)
        return self.lengths[bucket], members[self._slice(order, index)]

    def in_order(self) -> list[tuple[int, np.ndarray]]:
        """All batches once, unshuffled."""
        return [(self.lengths[b], self._slice(self.members[b], i)) for b, i in self._plan()]

    def _slice(self, rows: np.ndarray, index: int) -> np.ndarray:
        return rows[index * self.batch_size : (index + 1) * self.batch_size]

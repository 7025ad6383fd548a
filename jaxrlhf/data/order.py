"""The order of the data: shuffles and length buckets as pure functions of seed and step.

There is no state to save: the position in the data is the step, so a resumed run gets the same batches.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int, count: int, stream: int = 0) -> np.ndarray:
    """A permutation of range(count), i64[count], read-only. `stream` separates uses that share seed and epoch.

    The function sorts raw Philox words instead of calling `Generator.permutation`. numpy never changes the output of a
    bit generator, but it may change the output of a generator's methods between versions.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(count)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Row indices i64[batch_size] of the batch at `step` of an endless shuffled stream.

    Each epoch has each row once. A batch may span two epochs and then hold a row twice. `count` must be at least 1.
    """
    if count < 1:
        raise ValueError("batch_rows needs at least one row")
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    return np.concatenate(
        [epoch_order(seed, int(epoch), count)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )


def hold_out(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(count) at random into (training rows, held-out rows): `size` held-out rows, but at most a tenth."""
    order = epoch_order(seed, 0, count, stream=2)
    size = min(size, count // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def checksum(rows: Iterable[np.ndarray]) -> str:
    """A 64-bit hash, in hex, of the arrays in this order."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.tobytes())
    return digest.hexdigest()


def bucket_lengths(lengths: np.ndarray, buckets: int, max_length: int, multiple: int = 8) -> np.ndarray:
    """At most `buckets` padded lengths, in ascending order. All rows fit, and about equally many rows have each length.

    The padded lengths are quantiles of `lengths` i64[N], rounded up to `multiple` and limited to `max_length`.
    """
    levels = np.quantile(lengths, np.arange(1, buckets + 1) / buckets, method="inverted_cdf")
    return np.unique(np.minimum(-(-levels // multiple) * multiple, max_length)).astype(np.int64)


@dataclass(frozen=True)
class Buckets:
    """Rows grouped by padded length; every batch has rows of one length.

    Each epoch shuffles the rows of each bucket, cuts them into batches (the last one of a bucket may be short) and
    shuffles the batches. The number of batches is the same in every epoch.
    """

    members: tuple[np.ndarray, ...]  # rows of each bucket, i64[n]
    lengths: tuple[int, ...]  # padded length of each bucket
    batch_size: int

    @classmethod
    def of(cls, row_lengths: np.ndarray, bounds: np.ndarray, batch_size: int) -> "Buckets":
        """Puts each row into the first of the ascending `bounds` that it fits; empty buckets are left out."""
        bucket = np.searchsorted(bounds, row_lengths)
        if len(bucket) and bucket.max() >= len(bounds):
            raise ValueError(f"a row of {row_lengths.max()} tokens fits none of the lengths {bounds.tolist()}")
        used = np.unique(bucket)
        return cls(tuple(np.flatnonzero(bucket == i) for i in used), tuple(int(bounds[i]) for i in used), batch_size)

    def _batches(self) -> list[tuple[int, int]]:
        """(bucket, index of the batch in this bucket) for all batches of an epoch, unshuffled."""
        return [(b, i) for b, rows in enumerate(self.members) for i in range(-(-len(rows) // self.batch_size))]

    def __len__(self) -> int:
        """Batches per epoch."""
        return sum(-(-len(rows) // self.batch_size) for rows in self.members)

    def batch(self, seed: int, step: int) -> tuple[int, np.ndarray]:
        """The padded length and the rows, i64[<= batch_size], of the batch at `step`."""
        epoch, position = divmod(step, len(self))
        bucket, index = self._batches()[epoch_order(seed, epoch, len(self), stream=1)[position]]
        members = self.members[bucket]
        order = epoch_order(seed, epoch, len(members), stream=3 + bucket)
        return self.lengths[bucket], members[self._slice(order, index)]

    def in_order(self) -> list[tuple[int, np.ndarray]]:
        """All batches of an epoch, unshuffled."""
        return [(self.lengths[b], self._slice(self.members[b], i)) for b, i in self._batches()]

    def _slice(self, rows: np.ndarray, index: int) -> np.ndarray:
        return rows[index * self.batch_size : (index + 1) * self.batch_size]

"""Orders the data. Shuffles and length buckets are pure functions of seed and step.

There is no state to save, because the step is the position in the data. So a resumed run gets the same batches.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int, count: int, stream: int = 0) -> np.ndarray:
    """Returns a permutation of range(count), i64[count], read-only.

    Each value of `stream` gives another permutation for the same seed and epoch. The function sorts raw Philox words
    instead of calling `Generator.permutation`. numpy never changes the output of a bit generator, but a new version of
    numpy may change the output of `Generator` methods.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(count)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_rows(
    seed: int, step: int, batch_size: int, count: int, keys: np.ndarray | None = None
) -> np.ndarray:
    """Returns the row indices, i64[batch_size], of the batch at `step` of an endless shuffled stream.

    Each epoch has each row once. A batch that spans two epochs may hold a row twice. `count` is the number of rows and
    must be at least 1. If `keys` f64[count] are given, the first epoch has the rows in ascending order of their keys.
    Rows with equal keys stay shuffled.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    batch = []
    for epoch in np.unique(epochs):
        order = epoch_order(seed, int(epoch), count)
        if keys is not None and epoch == 0:
            order = order[np.argsort(keys[order], kind="stable")]
        batch.append(order[places[epochs == epoch]])
    return np.concatenate(batch)


def hold_out(items: Sequence[T], size: int, seed: int) -> tuple[list[T], list[T]]:
    """Splits the items at random and returns (training items, held-out items), each in the order of `items`.

    There are `size` held-out items, but at most a tenth of all distinct items. An object may appear several times in
    `items`, as in a mixture of sources. If it is held out, it is once in the held-out items, and not in the others.
    """
    distinct = list({id(item): item for item in items}.values())
    order = epoch_order(seed, 0, len(distinct), stream=2)
    held = [distinct[i] for i in np.sort(order[: min(size, len(distinct) // 10)])]
    places = set(map(id, held))
    return [item for item in items if id(item) not in places], held


def checksum(rows: Iterable[np.ndarray]) -> str:
    """Returns a 64-bit hash, in hex, of the arrays in this order."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.tobytes())
    return digest.hexdigest()


def bucket_lengths(lengths: np.ndarray, buckets: int, max_length: int, multiple: int = 8) -> np.ndarray:
    """Returns at most `buckets` padded lengths in ascending order.

    Every row fits into the longest padded length, and each padded length serves about the same number of rows. The
    padded lengths are quantiles of the row lengths `lengths` i64[N]. They are rounded up to multiples of `multiple`
    and limited to `max_length`.
    """
    levels = np.quantile(lengths, np.arange(1, buckets + 1) / buckets, method="inverted_cdf")
    return np.unique(np.minimum(-(-levels // multiple) * multiple, max_length)).astype(np.int64)


@dataclass(frozen=True)
class Buckets:
    """Rows in buckets. All rows of a bucket, and so all rows of a batch, have the same padded length.

    Each epoch shuffles the rows of each bucket, divides them into batches and shuffles the batches. The last batch of
    a bucket may be short. The number of batches is the same in every epoch.
    """

    members: tuple[np.ndarray, ...]  # rows of each bucket, i64[n]
    lengths: tuple[int, ...]  # padded length of each bucket
    batch_size: int

    @classmethod
    def of(cls, row_lengths: np.ndarray, bounds: np.ndarray, batch_size: int) -> "Buckets":
        """Puts each row into the bucket with the smallest padded length that is long enough for the row.

        `bounds` are the padded lengths of the buckets in ascending order. Empty buckets are left out.
        """
        bucket = np.searchsorted(bounds, row_lengths)
        if len(bucket) and bucket.max() >= len(bounds):
            raise ValueError(f"a row must have at most {max(bounds, default=0)} tokens, not {row_lengths.max()}")
        used = np.unique(bucket)
        return cls(tuple(np.flatnonzero(bucket == i) for i in used), tuple(int(bounds[i]) for i in used), batch_size)

    def _batches(self) -> list[tuple[int, int]]:
        """Returns (bucket, index of the batch in this bucket) for all batches of an epoch, unshuffled."""
        return [(b, i) for b, rows in enumerate(self.members) for i in range(-(-len(rows) // self.batch_size))]

    def __len__(self) -> int:
        """The number of batches per epoch."""
        return sum(-(-len(rows) // self.batch_size) for rows in self.members)

    def batch(self, seed: int, step: int) -> tuple[int, np.ndarray]:
        """Returns the padded length and the rows, i64[<= batch_size], of the batch at `step`."""
        epoch, position = divmod(step, len(self))
        bucket, index = self._batches()[epoch_order(seed, epoch, len(self), stream=1)[position]]
        members = self.members[bucket]
        order = epoch_order(seed, epoch, len(members), stream=3 + bucket)
        return self.lengths[bucket], members[self._slice(order, index)]

    def in_order(self) -> list[tuple[int, np.ndarray]]:
        """Returns padded length and rows of each batch of an epoch, unshuffled."""
        return [(self.lengths[b], self._slice(self.members[b], i)) for b, i in self._batches()]

    def _slice(self, rows: np.ndarray, index: int) -> np.ndarray:
        return rows[index * self.batch_size : (index + 1) * self.batch_size]

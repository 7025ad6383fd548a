"""Finds near-duplicates among many rows: MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al. 2014).

A row has one or more texts ("sides"), such as prompt and response. Two rows are near-duplicates if on every side

- the texts are equal apart from case, blanks and the marks . , ; : ! ? and quotes, or
- the word triples of both texts have a Jaccard similarity of at least the threshold,

and if both rows have the same numbers: "12 + 7" and "12 + 8" are two exercises. Word triples that occur in more than
`TEMPLATE_ROWS` rows are instructions or few-shot examples around the rows' own text, and are left out. A side with
fewer than `LEAST_TRIPLES` other triples is compared by equality alone, because one changed word of a short text changes
its meaning. The library datasketch needs 1.3 times as long for signatures alone, and keeps no sets to compare.
"""

import hashlib
import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

THRESHOLD = 0.8  # with 30 words, one of which differs: 25 of 31 triples are shared
LEAST_TRIPLES = 8
TEMPLATE_ROWS = 20  # and at least one row in 10,000
SAMPLE = 256  # word triples per side that are kept: those with the smallest hashes, a random sample (bottom-k)
BANDS, PER_BAND = 12, 4  # similar pairs of 0.8 are missed with a probability of 0.2%: (1 - 0.8**4)**12
SIDES = 4  # the two lowest bits of a triple's hash are the number of the side

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without blanks: each character counts as a word
_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s.,;:!?\"'…“”‘’]")
_WORD_OR_IDEOGRAPH = re.compile(rf"\d+(?:[.,]\d+)*|[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s.,;:!?\"'…“”‘’。、，！？]")
_HAS_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")


def words(text: str) -> list[str]:
    """Returns the words, numbers and symbols of a text in lower case, without the marks of sentences."""
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return (_WORD_OR_IDEOGRAPH if _HAS_IDEOGRAPH.search(text) else _WORD).findall(text)


def digest(*texts: str) -> int:
    """Returns a 64-bit hash of texts. It is the same in every process."""
    data = "\x1f".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


class _Vocabulary(dict):
    """A cache of the 32-bit hashes of words."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1_000_000:
            self.clear()
        self[word] = value = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return value


class Sketches:
    """The sketches of rows. A row has at most `SAMPLE` hashes of 4 bytes for each of its texts.

    Rows are numbered from 0 as they are added.
    """

    def __init__(self) -> None:
        self._vocabulary = _Vocabulary()
        self._hashes: list[np.ndarray] = []  # u32[n] of each row
        self._sides: list[tuple[int, ...]] = []  # hash of each side's words
        self._numbers: list[int] = []
        self._texts: list[int] = []  # hash of the row's texts as they are

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, *sides: str) -> None:
        """Adds a row with at most `SIDES` texts."""
        parts, digests, numbers = [], [], []
        for side, text in enumerate(sides):
            found = words(text)
            ids = np.fromiter(map(self._vocabulary.__getitem__, found), np.uint32, len(found))
            digests.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest()))
            numbers += [word for word in found if word[0].isdigit()]
            parts.append(_sample(ids, side))
        self._hashes.append(np.concatenate(parts))
        self._sides.append(tuple(digests))
        self._texts.append(digest(*sides))
        self._numbers.append(zlib.crc32(" ".join(sorted(numbers)).encode()))

    def truncate(self, count: int) -> None:
        """Removes all rows but the first `count`."""
        del self._hashes[count:], self._sides[count:], self._numbers[count:], self._texts[count:]

    def pairs(self, threshold: float = THRESHOLD, equal: bool = False) -> list[tuple[int, int]]:
        """Returns pairs (i, j), i < j, of near-duplicates. Not all pairs of a cluster are returned, but enough
        to connect its rows.

        Pairs of equal texts are left out unless `equal` is set.
        """
        kept = self._without_template()
        candidates = _equal([hash(sides) for sides in self._sides])
        candidates = set(itertools.chain(candidates, _candidates(kept)))
        if not equal:
            candidates = {(i, j) for i, j in candidates if self._texts[i] != self._texts[j]}
        return [pair for pair in sorted(candidates) if self._similar(kept, *pair, threshold)]

    def _without_template(self) -> list[np.ndarray]:
        if not self._hashes:
            return []
        whole = np.concatenate(self._hashes)
        values, counts = np.unique(whole, return_counts=True)
        template = values[counts > max(TEMPLATE_ROWS, len(self) // 10_000)]
        if not len(template):
            return self._hashes
        own = template[np.minimum(np.searchsorted(template, whole), len(template) - 1)] != whole
        ends = np.cumsum([len(row) for row in self._hashes]).tolist()
        return [row[own[end - len(row) : end]] for row, end in zip(self._hashes, ends)]

    def _similar(self, kept: Sequence[np.ndarray], i: int, j: int, threshold: float) -> bool:
        if self._numbers[i] != self._numbers[j] or len(self._sides[i]) != len(self._sides[j]):
            return False
        for side, (one, other) in enumerate(zip(self._sides[i], self._sides[j])):
            if one == other:
                continue
            a, b = (row[row % SIDES == side] for row in (kept[i], kept[j]))
            if min(len(a), len(b)) < LEAST_TRIPLES:
                return False
            shared = len(np.intersect1d(a, b, assume_unique=True))
            if shared < threshold * (len(a) + len(b) - shared):
                return False
        return True


def clusters(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Returns, for each of `count` rows, the first row of its cluster. The two rows of a pair are in one cluster."""
    first = list(range(count))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for i, j in pairs:
        a, b = sorted((root(i), root(j)))
        first[b] = a
    return [root(i) for i in range(count)]


def _sample(ids: np.ndarray, side: int) -> np.ndarray:
    """Returns the smallest hashes of a side's word triples, u32[at most SAMPLE], sorted, without repeats."""
    if len(ids) < 3:
        return np.zeros(0, np.uint32)
    hashes = _mix(_mix(_mix(ids[:-2]) + ids[1:-1]) + ids[2:])
    hashes &= np.uint32(2**32 - SIDES)
    hashes |= np.uint32(side)
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])][:SAMPLE]


def _mix(x: np.ndarray, seed: int = 0x9E3779B1) -> np.ndarray:
    """Returns a pseudorandom permutation of 32-bit numbers. `seed` is odd."""
    x = x * np.uint32(seed)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA77)
    return x ^ (x >> np.uint32(13))


def _candidates(rows: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yields pairs of rows whose MinHash signatures are equal in at least one band."""
    index = np.array([i for i, row in enumerate(rows) if len(row) >= LEAST_TRIPLES], np.int64)
    if len(index) < 2:
        return
    values = np.concatenate([rows[i] for i in index])
    starts = np.cumsum([0, *(len(rows[i]) for i in index[:-1])])
    seeds = np.random.default_rng(0).integers(0, 2**31, BANDS * PER_BAND) * 2 + 1
    for band in range(BANDS):
        key = np.zeros(len(index), np.uint64)
        for seed in seeds[band * PER_BAND : (band + 1) * PER_BAND]:
            key = key * np.uint64(0x9E3779B97F4A7C15) + np.minimum.reduceat(_mix(values, int(seed)), starts)
        for i, j in _equal(key):
            yield int(index[i]), int(index[j])


def _equal(keys: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields pairs (i, j), i < j, with equal keys. i is the last row before j with this key, or the first of all."""
    keys = np.asarray(keys)
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    begins = np.ones(len(order), bool)
    begins[same] = False
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0)) if len(order) else order
    for at in same.tolist():
        yield int(order[at - 1]), int(order[at])
        yield int(order[first[at]]), int(order[at])

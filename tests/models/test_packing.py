"""Places of packed rows: those of a plain first-fit decreasing, and each token once."""

import jax
import numpy as np
import pytest

from jaxrlhf.models.packing import pack, pack_rows, take_pass
from jaxrlhf.records import Rollout

packed = jax.jit(pack, static_argnums=1)


def first_fit_decreasing(lengths, capacity):
    filled, sequence, start = [], [0] * len(lengths), [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = [i for i, n in enumerate(filled) if n + lengths[row] <= capacity]
        if not fits:
            filled.append(0)
        sequence[row] = fits[0] if fits else len(filled) - 1
        start[row] = filled[sequence[row]]
        filled[sequence[row]] += lengths[row]
    return sequence, start, sum(n > 0 for n in filled)


@pytest.mark.parametrize(
    "lengths",
    [[0], [10], [0, 0, 0], [10, 10, 10], [1, 10, 2], [3, 7, 5, 0, 6, 4, 2], [6, 6, 6, 6], [9, 1, 9, 1, 1], [5] * 7],
    ids=str,
)
def test_places_are_those_of_the_plain_algorithm(lengths):
    found = packed(np.array(lengths, np.int32), 10)
    assert tuple(x.tolist() for x in found) == first_fit_decreasing(lengths, 10)


@pytest.mark.parametrize("joined", [1, 2, 3])
def test_short_rows_need_no_more_sequences_than_their_number_over_what_fits(joined):
    generator = np.random.default_rng(0)
    for _ in range(30):
        lengths = generator.integers(0, 11, 12).astype(np.int32)
        sequence, start, used = (np.asarray(x) for x in packed(lengths, 10 * joined))
        assert used <= -(-12 // joined) and sequence.max() < max(used, 1)
        taken = [(m, s) for m, first, n in zip(sequence, start, lengths) for s in range(first, first + n)]
        assert len(set(taken)) == len(taken) == lengths.sum() and all(s < 10 * joined for _, s in taken)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_every_token_before_the_last_learned_one_is_in_one_pass(size):
    """Prompts padded on the left, an empty completion, and one with a token that is not learned in the middle."""
    P, R, prompts, answers = 3, 4, np.array([3, 1, 2, 3, 1, 2]), np.array([4, 1, 0, 2, 3, 4])
    columns = np.arange(P + R)
    mask = (columns >= P - prompts[:, None]) & (columns < P + answers[:, None])
    learned = mask[:, P:].copy()
    learned[4, 1] = False
    tokens = 100 * np.arange(6)[:, None] + columns + 1
    rows = Rollout(
        tokens.astype(np.int32), mask, learned, np.zeros((6, R), np.float32), np.ones(6, bool), np.arange(1.0, 7.0)
    )
    sequences = pack_rows(rows, size)
    seen, states, total = [], [], np.zeros((6, R))
    for i in range(int(sequences.passes)):
        part = take_pass(sequences, i)
        assert part.tokens.shape == (size, P + R)
        real = np.asarray(part.segments) > 0
        seen += np.asarray(part.tokens)[real].tolist()
        np.testing.assert_array_equal(np.asarray(part.segments)[real], np.asarray(part.tokens)[real] // 100 + 1)
        # The state of a slot stands for its token here.
        hidden = np.asarray(part.tokens, np.float32)[..., None]
        before = np.asarray(part.states(hidden))[0, : int(part.count), 0]
        targets, temperature = (np.asarray(x)[0, : int(part.count)] for x in (part.targets, part.temperature))
        np.testing.assert_array_equal(targets, before + 1)
        np.testing.assert_array_equal(temperature, targets // 100 + 1)
        states += targets.tolist()
        total += np.asarray(part.rows(part.targets.astype(np.float32)))
    last = np.array([max(np.flatnonzero(row), default=-1) for row in learned])
    needed = mask & (columns < P + last[:, None]) & (last >= 0)[:, None]
    assert sorted(seen) == sorted(tokens[needed].tolist())
    assert sorted(states) == sorted(tokens[:, P:][learned].tolist())
    np.testing.assert_array_equal(total, np.where(learned, tokens[:, P:], 0))

"""Shuffles and buckets: pure functions of seed and step that give each row once an epoch."""

import numpy as np
import pytest

from jaxrlhf.data.order import Buckets, batch_rows, bucket_lengths, epoch_order, hold_out


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(epoch_order(7, 3, 100), epoch_order.__wrapped__(7, 3, 100))


def test_the_order_is_the_same_on_every_platform():
    # Written down once: Philox words and SeedSequence are promised to stay as they are.
    assert epoch_order(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert not epoch_order(0, 0, 10).flags.writeable


@pytest.mark.parametrize(("batch_size", "count"), [(4, 12), (5, 12), (1, 3), (12, 5), (7, 7), (3, 1)])
def test_each_row_once_an_epoch(batch_size, count):
    stream = np.concatenate([batch_rows(3, step, batch_size, count) for step in range(3 * count)])
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_resuming_anywhere_gives_the_same_rows():
    whole = [batch_rows(5, step, 6, 20).tolist() for step in range(12)]
    for start in (11, 4, 7):
        epoch_order.cache_clear()
        assert [batch_rows(5, step, 6, 20).tolist() for step in range(start, 12)] == whole[start:]
    assert whole != [batch_rows(6, step, 6, 20).tolist() for step in range(12)]


def test_no_rows():
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        batch_rows(0, 0, 4, 0)


@pytest.mark.parametrize(("count", "wanted", "held"), [(100, 5, 5), (100, 50, 10), (9, 5, 0), (100, 0, 0)])
def test_hold_out_splits(count, wanted, held):
    items = [[i] for i in range(count)]
    train, heldout = hold_out(items, wanted, seed=1)
    assert len(heldout) == held
    assert sorted([*train, *heldout]) == items and train == sorted(train) and heldout == sorted(heldout)
    assert held == 0 or heldout != hold_out(items, wanted, seed=2)[1]


def test_hold_out_takes_all_appearances_of_an_item():
    items = [[i] for i in range(20)]
    train, heldout = hold_out([*items, *items[:10]], 2, seed=1)
    assert len(heldout) == 2 and not any(item in heldout for item in train)
    assert len(train) == 30 - 2 - sum(item in items[:10] for item in heldout)


def test_keys_order_the_first_epoch():
    keys = np.array([2.0, 0.0, 1.0, 0.0, 2.0, 1.0])
    first = np.concatenate([batch_rows(3, step, 2, 6, keys) for step in range(3)])
    assert sorted(first) == list(range(6)) and keys[first].tolist() == sorted(keys)
    second = [batch_rows(3, step, 2, 6, keys).tolist() for step in range(3, 6)]
    assert second == [batch_rows(3, step, 2, 6).tolist() for step in range(3, 6)]


def test_bucket_lengths_follow_the_data():
    lengths = np.concatenate([np.full(50, 5), np.full(50, 30), np.full(50, 61), np.full(50, 100)])
    assert bucket_lengths(lengths, 4, 512).tolist() == [8, 32, 64, 104]
    assert bucket_lengths(lengths, 4, 100).tolist() == [8, 32, 64, 100]
    assert bucket_lengths(lengths, 1, 512).tolist() == [104]
    assert bucket_lengths(np.array([7]), 4, 512).tolist() == [8]


def test_buckets_hold_every_row_once_an_epoch_and_reshuffle():
    lengths = np.random.default_rng(0).integers(1, 65, size=103)
    buckets = Buckets.of(lengths, np.array([8, 16, 40, 64]), batch_size=10)
    epochs = []
    for epoch in range(3):
        batches = [buckets.batch(1, step) for step in range(epoch * len(buckets), (epoch + 1) * len(buckets))]
        for length, rows in batches:
            assert 1 <= len(rows) <= 10 and lengths[rows].max() <= length
            assert lengths[rows].min() > {8: 0, 16: 8, 40: 16, 64: 40}[length]
        epochs.append(np.concatenate([rows for _, rows in batches]).tolist())
        assert sorted(epochs[-1]) == list(range(103))
    assert epochs[0] != epochs[1] != epochs[2]
    in_order = buckets.in_order()
    assert len(in_order) == len(buckets)
    assert sorted(np.concatenate([rows for _, rows in in_order])) == list(range(103))


def test_a_row_that_fits_no_bucket():
    with pytest.raises(ValueError, match="at most 64 tokens, not 65"):
        Buckets.of(np.array([3, 65]), np.array([8, 64]), 2)

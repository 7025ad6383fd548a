import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.distributed.mesh import split_rows
from jaxrlhf.steps.metrics import largest, share
from jaxrlhf.steps.microbatches import accumulate


def test_rows_keep_their_order_and_must_divide():
    tree = {"a": jnp.arange(12).reshape(6, 2), "b": jnp.arange(6)}
    split = split_rows(tree, 3)
    assert split["a"].shape == (3, 2, 2) and split["b"].tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="6 rows cannot be split into 4 equal parts"):
        split_rows(tree, 4)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_shares_add_up_and_maxima_do_not(parts):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    x[2] -= 100  # a maximum below zero in some parts

    def loss(weights, rows):
        y = rows @ weights
        return jnp.sum(y**2) / 6, {"mean": share(jnp.sum(y) / 6), "x": largest(jnp.max(rows)), "y": largest(jnp.max(y))}

    weights = jnp.array([1.0, -2.0, 0.5])
    value, metrics, grads = accumulate(loss, weights, jnp.asarray(x), parts)
    y = x @ np.asarray(weights)
    assert float(value) == pytest.approx((y**2).mean(), rel=1e-5)
    assert float(metrics["mean"].value) == pytest.approx(y.mean(), rel=1e-4)
    assert float(metrics["x"].value) == pytest.approx(x.max())
    np.testing.assert_allclose(grads, 2 * (y[:, None] * x).mean(0), rtol=1e-4)
    assert jax.tree.structure(grads) == jax.tree.structure(weights)

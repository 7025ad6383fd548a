"""A linear layer with a LoRA pair: what it computes, and the gradients of the product that merges both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig
from jaxrlhf.models.adapters import bind, for_decoding, init_adapter
from jaxrlhf.models.decoder import linear_shapes, named_parameters
from jaxrlhf.models.linear import Linear, merged_product


@pytest.fixture(scope="module")
def given():
    """x, kernel, a, b, scale, and a weight for each result."""
    generator = np.random.default_rng(0)
    shapes = (2, 5, 7), (7, 6), (7, 3), (3, 6), (), (2, 5, 6)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_one_product_equals_the_sum_of_two_and_has_its_gradients(given):
    *arguments, weight = given

    def apart(x, kernel, a, b, scale):
        return x @ kernel + scale * (x @ a) @ b

    def with_gradients(product):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(product(*args) * weight), argnums=(0, 1, 2, 3)))

    for ours, theirs in zip(*(jax.tree.leaves(with_gradients(f)(*arguments)) for f in (merged_product, apart))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    scale = jax.grad(lambda s: jnp.sum(merged_product(*arguments[:4], s)))(arguments[4])
    assert scale == 0, "a constant of the adapter"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_for_decoding_computes_the_same(small, batch, dtype):
    adapter = init_adapter(small, AdapterConfig(rank=2, alpha=6.0), jax.random.key(3))
    generator = np.random.default_rng(1)
    adapter = {
        path: leaves | {"lora_b": 0.3 * generator.standard_normal(leaves["lora_b"].shape).astype(np.float32)}
        for path, leaves in adapter.items()
    }
    model = bind(jax.tree.map(lambda x: x.astype(dtype), small), adapter)
    before = set(named_parameters(model))
    ready = jax.jit(for_decoding)(model)
    exact = dtype == "float32"  # in bfloat16 nothing may be added up: a small pair would be lost
    changed = {name for name in named_parameters(ready) if "lora" in name or "qkv" in name}
    assert {"qkv" in name for name in changed} == {exact} and len(linear_shapes(small)) == 14
    logits = [np.asarray(jax.jit(type(model).__call__)(m, *batch))[batch[1]] for m in (model, ready)]
    np.testing.assert_allclose(*logits, atol=1e-5 if exact else 0, rtol=0)
    assert set(named_parameters(model)) == before, "what was given stays as it was"


def test_a_pair_that_bfloat16_would_lose_in_its_kernel_counts():
    layer = Linear(jnp.ones((4, 4), jnp.bfloat16))
    layer.lora_a, layer.lora_b, layer.lora_scale = jnp.zeros((4, 1)).at[0].set(1e-3), jnp.ones((1, 4)), jnp.float32(1)
    changed = layer(jnp.array([[1.0, -1.0, 1.0, -1.0]], jnp.bfloat16))
    assert not layer.can_merge
    np.testing.assert_allclose(changed.astype(jnp.float32), 1e-3, rtol=1e-2)

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.records import Experience, TrainState
from jaxrlhf.steps import flat
from jaxrlhf.steps.flat import by_leaf, joined
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step
from jaxrlhf.steps.ppo import init_ppo, ppo_update

RATE = OptimizerConfig(learning_rate=0.1)


def drawn(seed, scale=1.0):
    """Two modules and a head: matrices, vectors, scalars, and one array of half precision."""
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(scale * generator.standard_normal(shape), jnp.float32)

    def module():
        return {"lora_a": draw(6, 2), "lora_b": draw(2, 5), "lora_scale": draw(), "bias": draw(5)}

    half = {"kernel": draw(4, 3).astype(jnp.bfloat16)}
    return {"layers.0.mlp.up_proj": module(), "layers.1.mlp.up_proj": module(), "lm_head": half}


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_state_comes_back_as_it_was():
    params = drawn(0)
    state = TrainState(params, init_optimizer(params), jnp.int32(3))
    form = joined(state)
    assert {name: x.shape for name, x in form.adapter.arrays.items()} == {
        "float32 matrices": (1, 2 * (12 + 10)), "float32 vectors": (2 * (1 + 5),), "bfloat16 matrices": (4, 3),
    }  # fmt: skip
    same_bits(by_leaf(form), state)
    assert joined({}) == {}  # no value model


def test_steps_equal_those_leaf_by_leaf(monkeypatch):
    """Bit for bit where the norm clips nothing; the norm itself is a sum in another order."""
    monkeypatch.setattr(flat, "LARGEST", 11)  # lora_a stays alone
    run = jax.jit(optimizer_step)
    for clip, exact in ((1e9, True), (0.5, False)):
        config = OptimizerConfig(learning_rate=0.02, weight_decay=0.3, max_grad_norm=clip)
        params = drawn(0)
        plain = (params, init_optimizer(params))
        form = joined(plain)
        assert "layers.0.mlp.up_proj/lora_a" in form[0].arrays
        for step in range(3):
            grads = drawn(step + 1)
            *plain, noted = run(config, grads, plain[1], plain[0], jnp.int32(step))
            *form, same = run(config, joined(grads), form[1], form[0], jnp.int32(step))
            assert float(same["grad_norm"].value) == pytest.approx(float(noted["grad_norm"].value), rel=1e-6)
        if exact:
            same_bits(by_leaf(tuple(form)), tuple(plain))
        for a, b in zip(jax.tree.leaves(by_leaf(tuple(form))), jax.tree.leaves(tuple(plain))):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-7)


def test_what_a_mesh_splits_is_not_joined():
    """Gathering it would give each device the whole."""
    axes = ("data", "fsdp", "tensor")
    for sizes, alone in (((4, 1, 1), set()), ((2, 2, 1), {"lora_a"}), ((1, 1, 5), {"lora_b"})):
        with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * 3)):
            form = jax.eval_shape(joined, drawn(0))
        own = {name.split("/")[1] for name in form.arrays if "up_proj" in name}
        assert own == alone, sizes


def test_an_update_steps_as_many_arrays_however_deep_the_model(make_decoder):
    """Each root is one of a joined array's second moments."""
    config = PPOConfig(epochs=1, minibatches=2, optimizer=RATE, value_optimizer=RATE)
    row, answer = jnp.ones(4), jnp.ones((4, 3))
    masks = jnp.ones((4, 5), bool), jnp.ones((4, 3), bool)
    experience = Experience(jnp.ones((4, 5), jnp.int32), *masks, row, *[answer] * 6, kl_coef=row)

    def roots(layers):
        base = make_decoder(layers=layers)
        policy, value = (init_adapter(base, AdapterConfig(rank=2), jax.random.key(0), head) for head in (None, "value"))
        state = init_ppo(policy, value, config)
        text = jax.jit(ppo_update).lower(state, base, experience, jax.random.key(1), config).as_text()
        return len(re.findall(r"stablehlo\.sqrt", text))

    assert roots(3) == roots(1)

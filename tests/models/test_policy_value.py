"""Policy and value in one pass equal two passes: logprobs, entropies, values and the gradients of both adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig
from jaxrlhf.models.adapters import bind, init_adapter
from jaxrlhf.models.decoder import with_target
from jaxrlhf.models.policy_value import can_stack, response_outputs, stack
from jaxrlhf.models.scoring import response_logprobs, response_values
from jaxrlhf.models.target import Target


@pytest.fixture(scope="module")
def base(make_decoder):
    """A decoder whose programs are those of a GPU."""
    return with_target(make_decoder(layers=2), Target("gpu"))


@pytest.fixture(scope="module")
def inputs(sampled):
    return sampled.tokens, sampled.mask, sampled.response_mask, jnp.full(8, 0.7)


def two_passes(base, policy, value, tokens, mask, response_mask, temperature):
    logprobs, entropies = response_logprobs(bind(base, policy), tokens, mask, response_mask, temperature)
    return logprobs, entropies, response_values(bind(base, value), tokens, mask, response_mask)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_one_pass_equals_two(base, inputs, make_adapter, remat):
    """The ranks differ, and each adapter has modules that the other lacks."""
    policy = make_adapter(base, 1, targets=("q_proj", "down_proj"), rank=3)
    value = make_adapter(base, 2, head="value", targets=("q_proj", "up_proj"))
    assert can_stack(base, policy, value)

    def graded(outputs):
        def loss(trees):
            results = outputs(*trees)
            weights = [jnp.cos(i + jnp.arange(x.size).reshape(x.shape)) for i, x in enumerate(results)]
            return sum(jnp.vdot(x, w) for x, w in zip(results, weights)), results

        return jax.jit(jax.grad(loss, has_aux=True))((policy, value))

    one = graded(lambda *trees: response_outputs(base, *trees, *inputs, remat=remat))
    two = graded(lambda *trees: two_passes(base, *trees, *inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, two)
    assert all(np.any(leaf) for tree in one[0] for leaves in tree.values() for name, leaf in leaves.items()
               if name != "lora_scale")


def test_products_with_the_base_are_shared(base, inputs, roles, make_adapter):
    policy, value = make_adapter(base, 1), make_adapter(base, 2, head="value")

    def products(run):
        return jax.jit(run).lower(base, policy, value, *inputs).as_text().count("stablehlo.dot_general")

    heads = 2  # logits and scores
    assert products(response_outputs) - heads == (products(two_passes) - heads) / 2


def test_models_that_cannot_share_a_pass(base, make_adapter):
    policy, value = make_adapter(base, 1), make_adapter(base, 2, head="value")
    full = init_adapter(base, AdapterConfig(kind="full"), jax.random.key(0))
    embedding = {**policy, "embed_tokens": full["embed_tokens"]}
    assert can_stack(base, policy, value)
    assert can_stack(base, {**policy, "lm_head": full["lm_head"]}, value)
    for other in (None, {}, full, embedding):
        assert not can_stack(base, other, value)
    cudnn = dataclasses.replace(base.config.target, attention="cudnn")
    for target in (cudnn, Target("cpu")):
        assert not can_stack(with_target(base, target), policy, value)


def test_padding_is_zero(base, make_adapter):
    policy = make_adapter(base, 1, targets=("q_proj",), rank=3)
    value = make_adapter(base, 2, head="value", targets=("v_proj",), rank=2)
    stacked, axes = stack(policy, value)
    assert set(axes.values()) == {0}
    path = "layers.0.attention.q_proj"
    np.testing.assert_array_equal(stacked[path]["lora_a"][0], policy[path]["lora_a"])
    assert not np.any(stacked[path]["lora_a"][1])
    assert {leaves["lora_a"].shape[-1] for leaves in stacked.values()} == {2, 3}
    assert "score" not in stacked

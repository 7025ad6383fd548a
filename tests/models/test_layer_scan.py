"""Layers in a loop over stacked weights equal layers one by one, in scoring, in the reward and in an update."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig
from jaxrlhf.models import layer_scan
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.decoder import with_target
from jaxrlhf.models.layer_scan import stacked_adapter, unstacked_adapter, with_stacked_layers
from jaxrlhf.models.quantize import quantize_decoder
from jaxrlhf.models.rope import Rope
from jaxrlhf.models.target import ON_CPU, Target
from jaxrlhf.rewards.model import score_rollout
from jaxrlhf.steps.annotate import annotate
from jaxrlhf.steps.ppo import init_ppo, ppo_update

LOOP = Target("gpu", scan_layers=True)  # policy and value in one pass
SINGLE = dataclasses.replace(LOOP, scan_layers=False)
LAYERS = 5


@pytest.fixture(scope="module", params=["equal", "window in every second", "int8"])
def base(request, make_decoder):
    window = request.param.startswith("window")
    kinds = {"layer_kinds": (LayerKind(rope=Rope(), window=4), LayerKind(rope=Rope()))} if window else {}
    made = make_decoder(layers=LAYERS, scale=0.2, **kinds)
    return quantize_decoder(made, "int8") if request.param == "int8" else made


@pytest.fixture(scope="module")
def adapters(base, make_adapter):
    """Policy, value and reward. The value model lacks pairs in some layers, and has another rank."""
    targets = ("q_proj", "layers.1.mlp.up_proj", "layers.4.mlp.up_proj")
    value = make_adapter(base, 2, head="value", targets=targets, rank=3)
    return make_adapter(base, 1, targets=("q_proj", "down_proj")), value, make_adapter(base, 3, head="reward")


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def loop_and_single(run, base):
    """The results of run(base), with a loop over layers and without."""
    return [jax.jit(run)(with_target(base, target)) for target in (LOOP, SINGLE)]


def test_scoring_equals_layers_one_by_one(base, adapters, sampled):
    policy, value, reward = adapters

    def run(base):
        return annotate(base, policy, value, reward, sampled), score_rollout(base, reward, sampled)

    close(*loop_and_single(run, base))


def test_an_update_equals_layers_one_by_one(make_decoder, make_adapter, experience):
    base = make_decoder(layers=4, scale=0.2)
    policy = make_adapter(base, 1, targets=("q_proj", "down_proj"))
    value = make_adapter(base, 2, head="value", targets=("layers.1.mlp.up_proj", "layers.3.mlp.up_proj"), rank=3)
    rate = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    config = PPOConfig(
        epochs=1, minibatches=2, microbatch_size=2, remat="dots", optimizer=rate, value_optimizer=rate, ema_decay=0.5
    )

    def run(base):
        return ppo_update(init_ppo(policy, value, config), base, experience, jax.random.key(1), config)

    (loop, metrics), (single, expected) = loop_and_single(run, base)
    assert jax.tree.structure(loop) == jax.tree.structure(single)
    # A step of Adam divides a gradient by its own size, so that small differences of gradients near 0 grow.
    close((loop.policy, loop.value, loop.average), (single.policy, single.value, single.average), 2e-3)
    close(metrics["policy/loss"], expected["policy/loss"])
    before, after = (tree["layers.2.attention.q_proj"]["lora_b"] for tree in (policy, loop.policy))
    assert not np.allclose(before, after, atol=1e-2)


def test_a_program_has_the_operations_of_one_period(base, adapters, sampled):
    def products(layers_in_loop):
        text = jax.jit(annotate, static_argnames="microbatches").lower(
            with_target(base, dataclasses.replace(LOOP, scan_layers=layers_in_loop)), *adapters, sampled
        ).as_text()
        return text.count("stablehlo.dot_general")

    period = len(base.config.layer_kinds)
    outside = LAYERS % period
    assert products(True) < products(False) * (period + outside + 0.5) / LAYERS


def test_adapters_come_back_as_they_were(base, adapters):
    model, *stacked = with_stacked_layers(with_target(base, LOOP), *adapters)
    period = len(model.stacked)
    assert period == len(base.config.layer_kinds)
    assert len(model.layers) == LAYERS % period
    for adapter, changed in zip(adapters, stacked):
        assert jax.tree.structure(stacked_adapter(model, adapter)) == jax.tree.structure(changed)
        jax.tree.map(np.testing.assert_array_equal, unstacked_adapter(model, changed, adapter), adapter)


def test_when_layers_are_stacked(make_decoder, make_adapter, monkeypatch):
    base = make_decoder(layers=3)
    auto = with_target(base, Target("gpu"))
    full = init_adapter(base, AdapterConfig(kind="full"), jax.random.key(0))

    def stacks(model, *adapters):
        return with_stacked_layers(model, *adapters)[0].stacked is not None

    assert stacks(auto) and stacks(auto, None, make_adapter(base, 1))
    assert stacks(with_target(base, Target("cpu", scan_layers=True)))
    assert not stacks(with_target(base, ON_CPU))
    assert not stacks(with_target(base, SINGLE))
    assert not stacks(auto, full)
    assert not stacks(with_target(make_decoder(layers=1), LOOP)), "one step of a loop saves nothing"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base.layers))
    for limit in (size - 1, size):
        monkeypatch.setattr(layer_scan, "MOST_BYTES", limit)
        assert stacks(auto) == (limit == size)

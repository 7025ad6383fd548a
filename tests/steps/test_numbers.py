"""Whatever the base's weights are, logits, logprobs, losses and gradients are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig, PPOConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.records import SFTBatch, TrainState
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import annotate, build_experience
from jaxrlhf.steps.optimizer import init_optimizer
from jaxrlhf.steps.ppo import init_ppo, ppo_update
from jaxrlhf.steps.sft import sft_loss, sft_update

KEY = jax.random.key(0)


def floats(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_everything_computed_is_float32(make_decoder, make_adapter, prompts, sampling, dtype):
    """Of shapes and types alone: nothing is compiled."""
    base = make_decoder(dtype=dtype)
    assert floats(base) == {jnp.dtype(dtype)}
    policy, value = make_adapter(base, 1), make_adapter(base, 2, head="value")
    config = PPOConfig(minibatches=2, microbatch_size=2)
    shape = jax.eval_shape
    out = shape(rollout, base, policy, prompts, KEY, sampling)
    noted = shape(annotate, base, policy, value, None, out)
    made = shape(build_experience, out, noted, jax.ShapeDtypeStruct((8,), jnp.float32), 0.1)
    updated = shape(ppo_update, init_ppo(policy, value, config), base, made[0], KEY, config)
    batch = SFTBatch(*(jnp.ones((2, 5), d) for d in (jnp.int32, jnp.int32, bool)))
    loss = shape(sft_loss, base, policy, batch)
    state = TrainState(policy, init_optimizer(policy), jnp.int32(0))
    sft = shape(sft_update, state, base, batch, OptimizerConfig())
    logits = shape(lambda base: bind(base, policy)(prompts.tokens, prompts.mask), base)
    for tree in (out, noted, made, updated, loss, sft, logits):
        assert floats(tree) == {jnp.dtype("float32")}


def test_logprobs_are_not_rounded_to_bfloat16(programs, make_decoder, make_adapter, sampled):
    """The same weights in both types: near each other, and with digits that bfloat16 has not."""
    half = make_decoder(dtype=jnp.bfloat16)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    policy = make_adapter(half, 1)
    given = (sampled.tokens, sampled.mask, sampled.response_mask, sampled.temperature)
    mask = np.asarray(sampled.response_mask)
    again = np.asarray(programs.logprobs(bind(half, policy), *given)[0])
    exact = np.asarray(programs.logprobs(bind(full, policy), *given)[0])
    np.testing.assert_allclose(exact, again, atol=0.15)
    assert not np.array_equal(exact, again)
    rounded = again.astype(jnp.bfloat16).astype(np.float32)
    assert (rounded != again)[mask].mean() > 0.9

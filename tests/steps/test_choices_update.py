"""The update on answers that are choices: a first ratio of 1, and no gradient where only one token may follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import PPOConfig, Sampling
from jaxrlhf.steps.ppo import init_ppo, ppo_loss

R = 4
LAST = "layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def rows(programs, tiny, roles, prompts, choices):
    sampling = Sampling(max_new_tokens=R, choices=tuple("abcdef"), samples_per_prompt=2, stop_tokens=(4,))
    return programs.rollout(tiny, roles.policy, prompts, jax.random.key(5), sampling, choices)


@pytest.mark.parametrize(("trunk", "packed"), [("own", False), ("policy", True)])
def test_sampling_scoring_and_update_use_one_distribution(programs, tiny, roles, rows, choices, trunk, packed):
    config = PPOConfig(
        epochs=2, minibatches=2, value_trunk=trunk, packed=packed, microbatch_size=4, kl_loss="k3", entropy_coef=0.1
    )
    policy, value = {LAST: roles.policy[LAST]}, {"score": roles.value["score"]}
    value = value if trunk == "policy" else {LAST: roles.value[LAST], **value}
    given = tiny, policy, value, None, rows
    found = programs.annotate(*given, microbatches=4, value_trunk=trunk, packed=packed, choices=choices)
    whole = programs.annotate(*given, value_trunk=trunk, choices=choices)
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.ref_logprobs, whole.ref_logprobs, atol=1e-5)
    assert np.abs(whole.logprobs - whole.ref_logprobs).max() > 0.01
    scores = jnp.asarray(np.random.default_rng(4).standard_normal(16), jnp.float32)
    experience, _ = programs.experience(rows, found, scores, 0.1)
    state, updated = programs.update(init_ppo(policy, value, config), tiny, experience, jax.random.key(1), config,
                                     choices=choices)  # fmt: skip
    assert float(updated["policy/first_ratio_error"]) < 1e-5
    assert 0 < float(updated["policy/entropy"]) < np.log(3)
    assert np.abs(state.policy[LAST]["lora_b"] - policy[LAST]["lora_b"]).max() > 0


def test_a_forced_token_has_no_gradient(programs, tiny, roles, rows, choices):
    """With entropy bonus and KL in the loss; the rest of the tokens has a gradient."""
    config = PPOConfig(epochs=2, kl_loss="k2", entropy_coef=0.3)
    policy = {LAST: roles.policy[LAST]}
    found = programs.annotate(tiny, policy, None, None, rows, choices=choices)
    experience, _ = programs.experience(rows, found, jnp.arange(16.0), 0.1)
    nodes = choices.nodes(choices.index_of(rows.tokens[:, -R:]))
    forced = (jnp.sum(jnp.asarray(choices.allowed)[nodes], axis=-1) == 1) & rows.response_mask

    @jax.jit
    def gradient(policy, mask):
        masked = experience.replace(response_mask=mask, logprobs=experience.logprobs - 0.1, kl_coef=jnp.ones(16))
        loss = lambda policy: ppo_loss(policy, {}, tiny, masked, config, 10, 16, choices=choices)[0]  # noqa: E731
        return jax.grad(loss)(policy)[LAST]

    of_forced, of_free = gradient(policy, forced), gradient(policy, rows.response_mask & ~forced)
    assert forced.sum() > 10
    assert all(not np.any(of_forced[name]) for name in ("lora_a", "lora_b"))
    assert all(np.abs(of_free[name]).max() > 1e-3 for name in ("lora_a", "lora_b"))
    whole = gradient(policy, rows.response_mask)
    np.testing.assert_allclose(whole["lora_b"], of_free["lora_b"], rtol=1e-4, atol=1e-6)


DEVICES = """
import jax, numpy as np
from jaxrlhf.config import AdapterConfig, MeshConfig, PPOConfig, Sampling
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import make_mesh, shard_batch
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.stages.choices import on_mesh
from jaxrlhf.steps.annotate import annotate, build_experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update

base = Decoder(DecoderConfig(32, 16, 24, 1, 4, 2, 4, 64, stop_tokens=(1,), pad_token=0), jax.random.key(0))
policy, value = (init_adapter(base, AdapterConfig(rank=2, target_modules=("down_proj",)), jax.random.key(i), head)
                 for i, head in ((1, None), (2, "value")))
prompts = Prompts(np.random.default_rng(0).integers(2, 32, (16, 4)).astype(np.int32), np.ones((16, 4), bool))
choices = Choices.of([(5, 1), (5, 9, 1), (7, 3, 1), (8, 20, 30, 1)])
config = PPOConfig(epochs=2, minibatches=2, microbatch_size=4)

def run(sizes, devices, packed):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    settings = config.model_copy(update={"packed": packed})
    weights, few = shard(mesh, base), on_mesh(choices, mesh)
    sampling = Sampling(max_new_tokens=4, choices=("a", "b", "c", "d"))
    rows = Program(rollout, "rollout", mesh)(weights, None, shard_batch(mesh, prompts), jax.random.key(3), sampling,
                                             choices=few)
    static = {"static_argnames": ("microbatches", "packed")}
    found = Program(annotate, "annotate", mesh, **static)(weights, policy, value, None, rows, microbatches=4,
                                                          packed=packed, choices=few)
    experience = Program(build_experience, "experience", mesh)(rows, found, np.arange(16.0) / 8, 0.1)[0]
    state = shard(mesh, init_ppo(policy, value, settings))
    state, metrics = Program(ppo_update, "update", mesh)(state, weights, experience, jax.random.key(4), settings,
                                                         choices=few)
    assert float(metrics["policy/first_ratio_error"]) < 1e-5
    return jax.tree.map(np.asarray, (rows, found, state.policy, state.value))

expected = run({}, 1, False)
for sizes, packed in (({"data": 2, "context": 2, "tensor": 2}, False), ({"fsdp": 2, "data": 2, "tensor": 2}, True)):
    found = run(sizes, 8, packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found, expected)
print("ok")
"""


@pytest.mark.slow
def test_every_mesh_gives_the_same(processes):
    result = processes.run("-c", DEVICES, devices=8)
    assert (result.output, result.errors) == ("ok\n", "")

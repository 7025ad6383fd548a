"""Sequences whose positions are split over `context`, on 8 devices that the host plays in one process of its own."""

import pytest

EIGHT = """
import dataclasses, math, re
import jax, jax.numpy as jnp, numpy as np
from jaxrlhf.config import AdapterConfig, MeshConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import make_mesh, shard_batch
from jaxrlhf.models import attention
from jaxrlhf.models.adapters import bind, init_adapter
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import from_logits, response_logprobs_and_values, sequence_scores
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import SFTBatch
from jaxrlhf.steps.sft import sft_loss

B, P, R = 4, 48, 32  # 4 microbatches' rows; lengths that 8 divides
config = DecoderConfig(vocab_size=96, hidden_size=64, layers=2, heads=8, kv_heads=2, head_dim=8, intermediate_size=128,
                       max_positions=128)
config = dataclasses.replace(config, attention_softcap=20.0,
                             layer_kinds=(config.layer_kinds[0], dataclasses.replace(config.layer_kinds[0], window=20)))
tokens = jax.random.randint(jax.random.key(5), (B, P + R), 1, 96)
answers = jnp.arange(R) < jnp.array([32, 20, 5, 11])[:, None]
mask = (jnp.arange(P + R) >= jnp.array([0, 10, 40, 5])[:, None]) & jnp.concatenate([jnp.ones((B, P), bool), answers], 1)
segments = jnp.sort(jax.random.randint(jax.random.key(6), (B, P + R), 0, 4), axis=1)
batch = {"rollout": (tokens, mask, answers, jnp.ones(B)), "packed": SFTBatch(tokens, segments, segments > 1)}
base = Decoder(config, jax.random.key(0))

def drawn(kind, head=None):
    tree = init_adapter(base, AdapterConfig(kind=kind, rank=4), jax.random.key(1), head)
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape) if x.ndim else x
    return jax.tree.map(noise, tree)

def gradients(base, adapter, batch, remat):
    def loss(adapter):
        out = response_logprobs_and_values(bind(base, adapter), *batch["rollout"], remat)
        packed = sft_loss(base, {k: v for k, v in adapter.items() if k != "score"}, batch["packed"], remat)
        return sum(jnp.sum(x) for x in out) / 100 + packed / 100, out
    found = jax.value_and_grad(loss, has_aux=True)(adapter)
    return found, sequence_scores(bind(base, adapter), *batch["rollout"][:2])

def largest_gathered(text):
    sizes = re.findall(r"= \\(?\\w+\\[([\\d,]+)\\][^=]* all-gather(?:-start)?\\(.*?replica_groups=(.*)", text)
    return max((math.prod(map(int, size.split(","))) for size, _ in sizes), default=0)

WAYS = {
    "whole": (4096, "lora", "full", [{"context": 8}, {"fsdp": 2, "context": 2, "tensor": 2}]),
    "blocks": (32, "lora", "dots", [{"data": 2, "context": 4}]),
    "full": (32, "full", "none", [{"data": 2, "context": 2, "tensor": 2}]),
}
attention.BLOCK_ON_CPU = 16
for name, (longest, kind, remat, meshes) in WAYS.items():
    attention.LONGEST_WHOLE, adapter = longest, drawn(kind, "value")
    run = lambda *given: gradients(*given, remat)
    alone = Program(run, name)(base, adapter, batch)
    for sizes in meshes:
        mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
        given = shard(mesh, base), shard(mesh, adapter), shard_batch(mesh, batch)
        program = Program(run, name, mesh)
        split = program(*given)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), alone, split)
        text = program.lower(*given).compile().as_text()
        assert "all-to-all" in text, sizes
        if "fsdp" not in sizes and "tensor" not in sizes:  # those gather weights
            rows = B // sizes.get("data", 1)
            assert largest_gathered(text) < rows * (P + R) * 16, (sizes, largest_gathered(text))
print("ok")
"""


@pytest.mark.slow
def test_scoring_and_gradients_equal_those_of_one_device_and_gather_no_activations(processes):
    """With repeated key heads, a window, a soft cap, packed segments, both kinds of attention and each `remat`."""
    result = processes.run("-c", EIGHT, devices=8)
    assert (result.output, result.errors) == ("ok\n", "")

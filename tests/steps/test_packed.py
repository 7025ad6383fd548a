"""Rows side by side instead of padded: the same numbers from fewer passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import PPOConfig
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.decoder import with_target
from jaxrlhf.models.packing import pack_rows, take_pass
from jaxrlhf.models.rope import Rope
from jaxrlhf.models.scoring import response_logprobs
from jaxrlhf.models.target import Target
from jaxrlhf.records import SFTBatch
from jaxrlhf.steps.ppo import init_ppo

KEY = jax.random.key(13)
R = 6
# Lengths of eight completions: those that were sampled, some empty, one longer than all others, all full, all empty.
LENGTHS = {
    "sampled": None,
    "empty": (3, 0, 0, 1, 6, 2, 0, 4),
    "one long": (1, 1, 1, 6, 1, 1, 1, 1),
    "full": (6,) * 8,
    "none": (0,) * 8,
}


def cut(rows, lengths):
    """Rows whose completions have these lengths."""
    if lengths is None:
        return rows
    kept = jnp.arange(R) < jnp.array(lengths)[:, None]
    return rows.replace(mask=rows.mask.at[:, -R:].set(kept), response_mask=kept)


@pytest.mark.parametrize(("trunk", "microbatches"), [("own", 4), ("policy", 1)])
def test_annotate_gives_the_same(programs, tiny, roles, sampled, trunk, microbatches):
    value = roles.value if trunk == "own" else {"score": roles.value["score"]}
    for lengths in LENGTHS.values():
        given = tiny, roles.policy, value, roles.reference, cut(sampled, lengths)
        padded, packed = (
            programs.annotate(*given, microbatches=microbatches, value_trunk=trunk, packed=p) for p in (False, True)
        )
        for name in ("logprobs", "ref_logprobs", "values"):
            np.testing.assert_allclose(getattr(packed, name), getattr(padded, name), rtol=1e-5, atol=2e-6, err_msg=name)


SEQUENCES = {"loss": "gspo", "aggregation": "sequence", "kl_loss": "k3", "importance_cap": 2.0,
             "importance_level": "sequence"}  # fmt: skip
UPDATES = {
    "minibatches": {"epochs": 2, "minibatches": 4, "microbatch_size": 1, "aggregation": "constant"},
    "sequences": {"epochs": 1, "minibatches": 2, "microbatch_size": 2, "value_trunk": "policy", **SEQUENCES},
    "stopped": {"epochs": 2, "minibatches": 2, "kl_stop": 1e-3, "ema_decay": 0.5, "entropy_coef": 0.1},
    "one step, with texts": {"epochs": 1, "minibatches": 1, "microbatch_size": 4},
    "as on a GPU": {"epochs": 1, "minibatches": 1, "microbatch_size": 4},
}


@pytest.mark.parametrize("case", UPDATES)
def test_an_update_gives_the_same(programs, tiny, make_decoder, make_adapter, experience, case):
    """State and metrics, with rows that are not learnt (truncated), and with whole minibatches of them."""
    config = PPOConfig(**UPDATES[case])
    base = with_target(make_decoder(layers=3), Target("gpu")) if case == "as on a GPU" else tiny
    targets = ("down_proj",)  # fewer compile faster
    policy, value = make_adapter(base, 1, targets=targets), make_adapter(base, 2, head="value", targets=targets)
    start = init_ppo(policy, {"score": value["score"]} if config.value_trunk == "policy" else value, config)
    experience = experience.replace(kl_coef=jnp.full(8, 0.1))
    mix = None
    if case == "one step, with texts":
        tokens = jnp.asarray(np.random.default_rng(0).integers(3, 12, (4, 7)), jnp.int32)
        mix = SFTBatch(tokens, jnp.ones((4, 7), jnp.int32), jnp.ones((4, 7), bool))
    for name, lengths in LENGTHS.items():
        rows = cut(experience, lengths)
        if name == "sampled":
            rows = rows.replace(response_mask=rows.response_mask.at[2:4].set(False))
        old, new = (
            programs.update(start, base, rows, KEY, config.model_copy(update={"packed": p}), mix)
            for p in (False, True)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new[0], old[0])
        assert set(new[1]) == set(old[1])
        for metric in old[1]:
            np.testing.assert_allclose(new[1][metric], old[1][metric], rtol=2e-5, atol=2e-6, err_msg=f"{name} {metric}")
    assert case != "stopped" or float(old[1]["policy/steps"]) <= 4


@pytest.mark.parametrize("trained", [11, 15])
def test_longrope_turns_as_in_padded_rows(make_decoder, sampled, trained):
    numbers = (("factor", 4.0), ("long_factor", (4.0, 6.0, 8.0, 9.0)), ("original_max_position_embeddings", trained),
               ("short_factor", (1.0, 1.5, 2.0, 3.0)))  # fmt: skip
    base = make_decoder(layer_kinds=(LayerKind(rope=Rope(100.0, kind="longrope", numbers=numbers)),))
    rows = sampled.tokens, sampled.mask, sampled.response_mask, sampled.temperature

    @jax.jit
    def both(base):
        layout = pack_rows(sampled, 2)
        assert take_pass(layout, 0).tokens.shape == (2, 11)
        parts = [response_logprobs(base, *rows, packed=take_pass(layout, i))[0] for i in range(4)]
        return response_logprobs(base, *rows)[0], sum(parts)

    padded, packed = both(base)
    np.testing.assert_allclose(packed, padded, rtol=1e-5, atol=2e-6)


def test_short_rows_need_fewer_passes(sampled):
    def passes(lengths, size):
        return int(pack_rows(cut(sampled, lengths), size).passes)

    assert [passes((6,) * 8, size) for size in (1, 2, 8)] == [8, 4, 1]
    assert passes((0,) * 8, 2) == 0
    # Prompts of 5, 3, 1, 4, 2, 5, 3 and 1 tokens: 24 in all, in sequences of 11.
    assert [passes((1,) * 8, size) for size in (1, 2, 8)] == [3, 2, 1]


DEVICES = """
import re
import jax, numpy as np
from jaxrlhf.config import AdapterConfig, MeshConfig, PPOConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import make_mesh, replicated, shard_batch
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update

P, R, B = 5, 6, 16
draw = np.random.default_rng(0)
base = Decoder(DecoderConfig(32, 16, 24, 1, 2, 1, 8, 64, stop_tokens=(1,), pad_token=0), jax.random.key(0))
adapter = AdapterConfig(rank=2, target_modules=("down_proj",))
policy, value = (init_adapter(base, adapter, jax.random.key(i), head) for i, head in ((1, None), (2, "value")))
columns, lengths = np.arange(P + R), draw.integers(0, 4, B)
mask = (columns >= P - draw.integers(1, P + 1, (B, 1))) & (columns < P + lengths[:, None])
rows = {name: draw.standard_normal((B, R)).astype(np.float32) for name in
        ("sample_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns")}
rows = Experience(tokens=draw.integers(0, 32, (B, P + R)).astype(np.int32), mask=mask, response_mask=mask[:, P:],
                  temperature=np.ones(B, np.float32), kl_coef=np.zeros(B, np.float32), **rows)

def run(mesh, config):
    state = shard(mesh, init_ppo(policy, value, config))
    given = state, shard(mesh, base), shard_batch(mesh, rows), jax.device_put(jax.random.key(3), replicated(mesh))
    compiled = Program(ppo_update, "update", mesh=mesh).lower(*given, config).compile()
    return jax.tree.map(np.asarray, compiled(*given, config)), compiled.as_text()

config = PPOConfig(epochs=1, minibatches=2, microbatch_size=4)
packed = config.model_copy(update={"packed": True})
expected, _ = run(make_mesh(MeshConfig(), jax.devices()[:1]), config)
for sizes in ({}, {"data": 1, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 2}):
    found, text = run(make_mesh(MeshConfig(**sizes)), packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    if not sizes:  # what is sent: rows of a minibatch, gradients and counts, but no hidden states
        lines = re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\\(", text)
        sizes = [np.prod([int(n) for n in shape.split(",") if n]) for line in lines for shape in
                 re.findall(r"\\[([\\d,]*)\\]", line)]
        assert 8 * (P + R) in sizes, "rows of a minibatch"
        assert max(sizes) < (P + R) * 16, "hidden states of a row"
print("ok")
"""


def test_rows_stay_on_their_devices(processes):
    result = processes.run("-c", DEVICES, devices=4)
    assert (result.output, result.errors) == ("ok\n", "")

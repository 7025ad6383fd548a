"""The rollout on eight virtual devices: the same tokens on every mesh, and caches that stay where they are."""

EIGHT = """
import re
import jax, jax.numpy as jnp, numpy as np
from jaxrlhf.config import AdapterConfig, MeshConfig, Sampling
from jaxrlhf.distributed.mesh import batch_sharding, make_mesh, put, shard_batch
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, named_parameters, with_parameters
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Prompts
from jaxrlhf.stages.programs import rollout_program

P, R, n, H, STOPS = 5, 9, 2, 12, (4, 9)
config = DecoderConfig(
    vocab_size=16, hidden_size=32, intermediate_size=32, layers=1, heads=4, kv_heads=2, head_dim=H, max_positions=64,
    stop_tokens=STOPS, pad_token=0,
)
base = Decoder(config, jax.random.key(0))
base = with_parameters(base, {k: v if "norm" in k else 15 * v for k, v in named_parameters(base).items()})
adapter = init_adapter(base, AdapterConfig(rank=2), jax.random.key(1))
base, adapter = jax.tree.map(np.asarray, (base, adapter))
lengths = np.arange(24) % P + 1
mask = np.arange(P) >= P - lengths[:, None]
prompts = Prompts(np.random.default_rng(0).integers(10, 16, (24, P)).astype(np.int32) * mask, mask)
key = jax.random.key(3)

def run(mesh, slots):
    mesh = make_mesh(MeshConfig(**mesh), jax.devices()[: 8 if mesh else 1])
    program = rollout_program(mesh, base)
    args = shard(mesh, base), shard(mesh, adapter), shard_batch(mesh, prompts), key
    sampling = Sampling(max_new_tokens=R, samples_per_prompt=n, slots=slots)
    text = program.lower(*args, sampling).compile().as_text()
    found = program(*args, sampling)
    assert program.compiles == 1 and found.tokens.sharding == batch_sharding(mesh)
    return jax.device_get(found), text

one, _ = run({}, None)
ends = one.response_mask.sum(1)
assert {1, R} <= set(ends) and len(set(ends)) > 5
for mesh in ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    for slots in (None, 16):
        many, text = run(mesh, slots)
        for name in ("tokens", "mask", "response_mask", "ended"):
            np.testing.assert_array_equal(getattr(many, name), getattr(one, name), err_msg=f"{mesh} {slots} {name}")
        np.testing.assert_allclose(many.sample_logprobs, one.sample_logprobs, atol=1e-5)
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        sent = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?[(]", text)
        found_shapes = [dims for shapes in sent for dims in re.findall(r"f32.([0-9,]+)", shapes)]
        arrays = [tuple(map(int, dims.split(","))) for dims in found_shapes]
        assert mesh != {"data": 8} or not arrays, "each device runs loops of its own"
        # No array of the size of a head next to the columns of caches or of prompts is sent.
        caches = [shape for shape in arrays if {H, P + R} <= set(shape) or (H, P) == shape[-2:] or (P, H) == shape[-2:]]
        assert not caches, (mesh, slots, caches)
print("ok")
"""


def test_the_same_tokens_on_every_mesh_and_no_cache_is_sent(processes, tmp_path):
    result = processes.run("-c", EIGHT, tmp_path, devices=8)
    assert (result.output, result.errors) == ("ok\n", "")

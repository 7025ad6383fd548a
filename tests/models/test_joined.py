"""LoRA pairs that are joined for decoding in 16 bits on a GPU, against the layers that they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig
from jaxrlhf.models.adapters import bind, for_decoding, init_adapter
from jaxrlhf.models.decoder import named_parameters, with_target
from jaxrlhf.models.joined import product_of_parts
from jaxrlhf.models.quantize import quantize_decoder
from jaxrlhf.models.target import Target

GPU = Target("gpu")


@pytest.mark.parametrize("tokens, outputs", [(64, 256), (3, 72), (70, 130)])
def test_the_kernel_equals_a_product_of_the_rounded_sum(tokens, outputs):
    generator = np.random.default_rng(0)
    parts = generator.standard_normal((4, tokens, 16)).astype(np.float32)
    b = jnp.asarray(generator.standard_normal((16, outputs)), jnp.bfloat16)
    expected = jnp.asarray(parts.sum(0), jnp.bfloat16) @ b
    got = jax.jit(lambda *x: product_of_parts(*x, interpret=True))(parts, b)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=2**-7, atol=2**-7)


def trained(base, targets, rank=3):
    adapter = init_adapter(base, AdapterConfig(rank=rank, alpha=6.0, target_modules=targets), jax.random.key(3))
    generator = np.random.default_rng(1)
    return {
        path: leaves | {"lora_b": 0.3 * generator.standard_normal(leaves["lora_b"].shape).astype(np.float32)}
        for path, leaves in adapter.items()
    }


CASES = {
    "all": ("bfloat16", ("all-linear",), {}),
    "biases": ("bfloat16", ("all-linear",), dict(qkv_bias=True, output_bias=True, mlp_bias=True)),
    "some": ("bfloat16", ("k_proj", "up_proj"), {}),
    "no gate": ("bfloat16", ("all-linear",), dict(gated_mlp=False, activation="gelu")),
    "int8": ("int8", ("all-linear",), {}),
    "nf4": ("nf4", ("q_proj", "v_proj", "down_proj"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_joined_pairs_computes_the_same(make_decoder, batch, case):
    """Up to roundings of 16 bits: less than a tenth of what the pairs change."""
    kind, targets, settings = CASES[case]
    quantized = kind in ("int8", "nf4")
    base = make_decoder(dtype=jnp.bfloat16 if quantized else jnp.dtype(kind), **settings)
    base = with_target(quantize_decoder(base, kind) if quantized else base, GPU)
    model = bind(base, trained(base, targets))
    ready = jax.jit(for_decoding)(model)
    leaves = named_parameters(ready)
    joined = [name for name in leaves if name.endswith(("lora_a", "lora_b")) and leaves[name].dtype != jnp.float32]
    groups = {"all-linear": 4}.get(targets[0], len({"qkv" if t[0] in "qkv" else t for t in targets}))
    assert len(joined) == 2 * groups * len(base.layers)
    tokens, mask = batch[0] % base.config.vocab_size, batch[1]
    run = jax.jit(type(model).__call__)
    plain, ours, without = (np.asarray(run(m, tokens, mask), np.float32)[mask] for m in (model, ready, base))
    assert np.abs(ours - plain).max() < 0.1 * np.abs(plain - without).max()
    assert np.abs(ours - plain).mean() < 0.01 * np.abs(plain - without).mean() + 2**-7

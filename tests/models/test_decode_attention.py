"""The kernel of decoding, run by Pallas' interpreter on a CPU, against `attend` on a cache that holds the new token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.attention import attend, rotary_tables, rotate
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decode_attention import attend_newest, supported
from jaxrlhf.models.target import Target

# Rows that are nearly empty, that end at a block's edges, and that are full. Sizes N, K, H, S; then window, soft cap,
# dtype, and whether the kernel rotates. 40 and 300 columns are no multiple of a block.
CASES = {
    "full rows": (4, 4, 32, 16, None, None, "float32", True),
    "groups of 7": (7, 1, 64, 40, None, None, "float32", True),
    "several blocks": (4, 2, 64, 300, None, None, "float32", False),
    "window": (2, 1, 32, 300, 130, None, "float32", True),
    "window of 1": (2, 2, 32, 40, 1, None, "float32", False),
    "soft cap": (8, 1, 64, 40, 9, 2.0, "float32", False),
    "large heads": (2, 1, 256, 80, None, None, "bfloat16", True),
    "bfloat16": (4, 2, 128, 140, None, None, "bfloat16", True),
    "float16": (4, 2, 64, 48, 20, 30.0, "float16", True),
}


def inputs(N, K, H, S, dtype):
    generator, filled = np.random.default_rng(0), np.array([1, 2, 16, 17, S - 1, S])
    B = len(filled)
    shapes = (B, N, H), (B, K, H), (B, K, H), (B, K, H, S), (B, K, S, H)
    return *(jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes), jnp.minimum(filled, S)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_attention_over_a_cache_with_the_new_token(case):
    N, K, H, S, window, softcap, dtype, rotates = CASES[case]
    q, new_k, new_v, k, v, filled = inputs(N, K, H, S, dtype)
    tables = rotary_tables(filled[:, None] - 1, S, np.float32(100.0 ** -(np.arange(H // 2) / (H // 2))))
    turns = tables if rotates else None

    @jax.jit
    def ours(q, new_k, new_v, k, v):
        return attend_newest(q, new_k, new_v, turns, filled, k, v, window, 0.2, softcap, interpret=True)

    @jax.jit
    def plain(q, new_k, new_v, k, v):
        q, new_k, new_v = q[:, None], new_k[:, None], new_v[:, None]
        if rotates:
            q, new_k = rotate(q, tables), rotate(new_k, tables)
        rows, columns, count = jnp.arange(len(filled)), jnp.arange(S), filled[:, None]
        k, v = k.at[rows, :, :, filled - 1].set(new_k[:, 0]), v.at[rows, :, filled - 1].set(new_v[:, 0])
        seen = (columns < count) & (columns >= count - (S if window is None else window))
        return attend(q, k, v, seen[:, None], 0.2, softcap)[:, 0], k, v

    (out, *caches), (expected, *with_new) = (run(q, new_k, new_v, k, v) for run in (ours, plain))
    step = (4 if dtype == "float32" else 1) * float(jnp.finfo(dtype).eps)
    assert out.dtype == dtype and all(cache.dtype == dtype for cache in caches)
    for got, want in zip((out, *caches), (expected, *with_new)):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=4 * step, atol=4 * step)
    for got, want, before in zip(caches, with_new, (k, v)):
        np.testing.assert_array_equal(got == before, want == before, err_msg="no other column is written")


def test_what_is_beyond_the_filled_columns_has_no_effect():
    """Columns that a row has not filled hold what was there before."""
    q, new_k, new_v, k, v, filled = inputs(4, 2, 32, 40, "float32")
    beyond = np.arange(40) >= np.asarray(filled)[:, None]
    run = jax.jit(lambda k, v: attend_newest(q, new_k, new_v, None, filled, k, v, interpret=True)[0])
    other = run(jnp.where(beyond[:, None, None], 1e6, k), jnp.where(beyond[:, None, :, None], -1e6, v))
    np.testing.assert_array_equal(run(k, v), other)


def test_the_target_and_the_model_decide_who_computes_it():
    model = DecoderConfig(12, 256, 24, 1, 4, 2, 64, 64, target=Target("gpu", decode_kernels=True))
    off = dataclasses.replace(model.target, decode_kernels=False)
    assert supported(model, 6)
    assert not supported(dataclasses.replace(model, target=Target()), 6)
    assert not supported(dataclasses.replace(model, target=off), 6)
    assert not any(supported(dataclasses.replace(model, head_dim=H), 6) for H in (16, 80, 96, 512))
    for sizes, fits in (((2, 1, 2), True), ((4, 1, 1), False), ((1, 1, 4), False)):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, ("data", "fsdp", "tensor"))):
            assert supported(model, 6) == fits

"""Attention of one new token per row on a GPU, in one kernel: rotation, cache write, and attention over filled columns.

XLA's attention reads every column of the cache, and launches separate kernels for rotation, cache write, scores,
softmax and weighted sum. This kernel (Pallas, lowered by Triton) reads only the filled columns of each row. If there is
a sliding window, it reads only the columns inside the window. It computes the softmax block by block (2205.14135), and
splits the columns over programs if rows and heads are too few to fill the card (flash-decoding).

The tokens of a row are in the first columns of its cache, without gaps. The kernel has never run on a card. It compiles
for an H100, and Pallas' interpreter runs it on a CPU in the tests.

Sizes: B rows, N query heads, K key-value heads, G = N / K, H the head dimension, F = H / 2, S the columns of the cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrlhf.distributed.mesh import BATCH_AXES, automatic_axes
from jaxrlhf.models.attention import RotaryTables, rotate
from jaxrlhf.models.config import DecoderConfig

_LEAST_HEAD, _LARGEST_HEAD = 32, 256
_LEAST_QUERIES = 16  # rows of the smallest product of tensor cores
_TILE_BYTES = 1 << 15  # of a block of keys, and of a block of values
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors; columns are split until there are as many
_LOWEST = -1e30


def supported(config: DecoderConfig, rows: int) -> bool:
    """Returns True if the kernel computes attention of one new token per row for this model, mesh and target.

    XLA computes it instead if any of these holds: the platform is not a GPU, `Target.decode_kernels` is False, the head
    dimension is not a power of 2 from 32 to 256, or the mesh does not divide rows and key-value heads evenly.
    """
    H, (batch, tensor) = config.head_dim, _shards()
    return (
        config.target.platform == "gpu"
        and config.target.decode_kernels
        and _LEAST_HEAD <= H <= _LARGEST_HEAD
        and H & (H - 1) == 0
        and rows % batch == 0
        and config.kv_heads % tensor == 0
    )


def attend_newest(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    rotary: RotaryTables | None,
    filled_B: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes the newest key and value of each row into the caches, and attends from its newest query.

    `filled_B` counts the tokens of each row, i32[B], the newest included. The newest token is in column filled - 1, and
    its query sees the last `window` of the filled columns; None means all. `rotary` has the tables of the newest
    positions; None means no rotation. `scale` and `softcap` are as in `attention.attend`. `interpret` runs the kernel
    without a GPU.

    Returns (outputs [B,N,H], keys [B,K,H,S], values [B,K,S,H]). If the program does not use the
    old caches again, they are changed in place.
    """
    if rotary is not None and 2 * rotary.cos_BT1F.shape[-1] < q_BNH.shape[-1]:  # the kernel rotates only whole heads
        q_BNH, k_BKH = (rotate(x[:, None], rotary)[:, 0] for x in (q_BNH, k_BKH))
        rotary = None
    run = functools.partial(_attend_local, window, scale, softcap, interpret)
    arguments = q_BNH, k_BKH, v_BKH, rotary, filled_B, k_BKHS, v_BKSH
    if math.prod(_shards()) == 1:
        return run(*arguments)
    # A kernel is opaque to XLA's partitioner. Each device runs it on its own rows and heads.
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, "tensor")
    specs = heads, heads, heads, None if rotary is None else RotaryTables(rows, rows), rows, heads, heads
    return jax.shard_map(run, in_specs=specs, out_specs=(heads,) * 3, check_vma=False)(*arguments)


def _shards() -> tuple[int, int]:
    """Returns the numbers of devices over which XLA splits the rows and the heads."""
    sizes = automatic_axes()
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES), sizes.get("tensor", 1)


def _attend_local(window, scale, softcap, interpret, q_BNH, k_BKH, v_BKH, rotary, filled_B, k_BKHS, v_BKSH):
    """`attend_newest` on one device."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (B, N, H), (K, S) = q_BNH.shape, (k_BKHS.shape[1], k_BKHS.shape[3])
    block = min(max(16, _TILE_BYTES // (H * k_BKHS.dtype.itemsize)), 128, max(16, 1 << (S - 1).bit_length()))
    splits = min(pl.cdiv(_PROGRAMS, B * K), pl.cdiv(S, block))
    # The projections of one product are neighbours in memory already. XLA drops this concatenation then.
    new_BXH = jnp.concatenate([q_BNH, k_BKH, v_BKH], axis=1)
    kernel = functools.partial(
        _kernel, N, K, window, H**-0.5 if scale is None else scale, softcap, block, splits, rotary is not None
    )
    partial = jax.ShapeDtypeStruct((splits, B, N), jnp.float32)
    shapes = (
        jax.ShapeDtypeStruct((splits, B, N, H), q_BNH.dtype if splits == 1 else jnp.float32),
        partial,
        partial,
        jax.ShapeDtypeStruct(k_BKHS.shape, k_BKHS.dtype),
        jax.ShapeDtypeStruct(v_BKSH.shape, v_BKSH.dtype),
    )
    tables = () if rotary is None else (table[:, 0, 0] for table in rotary)
    inputs = (jnp.clip(filled_B, 1, S).astype(jnp.int32), new_BXH, *tables, k_BKHS, v_BKSH)
    out_PBNH, peak_PBN, total_PBN, k_BKHS, v_BKSH = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(B, K, splits),
        input_output_aliases={len(inputs) - 2: 3, len(inputs) - 1: 4},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_newest",
    )(*inputs)
    if splits == 1:
        return out_PBNH[0], k_BKHS, v_BKSH
    weight_PBN = jnp.exp(peak_PBN - jnp.max(peak_PBN, axis=0))
    out_BNH = jnp.einsum("PBN,PBNH->BNH", weight_PBN, out_PBNH) / jnp.sum(weight_PBN * total_PBN, axis=0)[..., None]
    return out_BNH.astype(q_BNH.dtype), k_BKHS, v_BKSH


def _kernel(N, K, window, scale, softcap, block, splits, rotates, filled_ref, new_ref, *refs):
    """Attends in one row, from the G query heads of one key-value head, to every splits-th block of columns.

    `new_ref` [B,N+2K,H] holds queries, keys and values of the newest tokens. With one split, outputs are divided by
    the sum of the weights. Otherwise the caller combines outputs, largest scores and sums of the splits.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *tables, k_ref, v_ref, out_ref, peak_ref, total_ref, new_k_ref, new_v_ref = refs
    H, S = v_ref.shape[-1], v_ref.shape[-2]
    G = N // K
    X = max(_LEAST_QUERIES, 1 << (G - 1).bit_length())
    row, head, split = (pl.program_id(axis) for axis in range(3))
    filled = filled_ref[row]
    newest, oldest = filled - 1, 0 if window is None else jnp.maximum(filled - window, 0)
    queries, own = pl.ds(head * G, X), jnp.arange(X) < G  # the smallest product has more rows than there are queries
    width = H // 2 if rotates else H
    parts = [pl.ds(start, width) for start in range(0, H, width)]

    def rotated(xs: list[jax.Array]) -> list[jax.Array]:
        if not rotates:
            return xs
        cos, sin = (table[row, :] for table in tables)
        first, second = (x.astype(jnp.float32) for x in xs)
        return [x.astype(new_ref.dtype) for x in (first * cos - second * sin, second * cos + first * sin)]

    def capped(scores: jax.Array) -> jax.Array:
        scores = scores * scale
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    qs = rotated([triton.load(new_ref.at[row, queries, part], mask=own[:, None], other=0) for part in parts])
    ks = rotated([new_ref[row, N + head, part] for part in parts])
    ks = [k.astype(k_ref.dtype) for k in ks]
    v = new_ref[row, N + K + head, :].astype(v_ref.dtype)

    def start() -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the first carry: (largest score f32[X], sum of weights f32[X], weighted values f32[X,H]).

        In split 0 it has the newest token, in other splits no token.
        """
        score = sum(jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1) for q, k in zip(qs, ks))
        first = split == 0
        peak = jnp.where(first, capped(score), _LOWEST)
        total = jnp.where(first, jnp.ones((X,), jnp.float32), 0.0)
        return peak, total, total[:, None] * v.astype(jnp.float32)

    first_block = oldest // block

    def add_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, out = carry
        at = (first_block + split + index * splits) * block
        columns, place = at + jnp.arange(block), pl.ds(at, block)
        # A mask that depends on `filled` would prevent wide loads. The mask of the last column is a constant.
        inside = None if S % block == 0 else columns < S
        fill = {} if inside is None else {"other": 0}
        scores = jnp.zeros((X, block), jnp.float32)
        for q, part in zip(qs, parts):
            keys = triton.load(k_ref.at[row, head, part, place], mask=None if inside is None else inside[None], **fill)
            scores += jnp.dot(q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        values = triton.load(v_ref.at[row, head, place, :], mask=None if inside is None else inside[:, None], **fill)
        seen = (columns >= oldest) & (columns < newest)
        scores = jnp.where(seen[None], capped(scores), _LOWEST)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.where(seen[None], jnp.exp(scores - new_peak[:, None]), 0.0)
        kept = jnp.exp(peak - new_peak)
        out = out * kept[:, None] + jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * kept + jnp.sum(weights, axis=1), out

    blocks = jnp.maximum(pl.cdiv(newest, block) - first_block - split, 0)
    peak, total, out = jax.lax.fori_loop(0, pl.cdiv(blocks, splits), add_block, start())
    if splits == 1:
        out = out / total[:, None]
    triton.store(out_ref.at[split, row, queries, :], out.astype(out_ref.dtype), mask=own[:, None])
    triton.store(peak_ref.at[split, row, queries], peak, mask=own)
    triton.store(total_ref.at[split, row, queries], total, mask=own)

    @pl.when(split == 0)
    def _write() -> None:
        for k, part in zip(ks, parts):
            new_k_ref[row, head, part, newest] = k
        new_v_ref[row, head, newest, :] = v

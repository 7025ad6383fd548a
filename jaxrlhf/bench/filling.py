"""Arrays in place of shapes: random weights, tokens and scores for the programs that `stages.calls` describes.

A leaf's name says what it holds, as it says where it lies on a mesh; a name that no rule covers is an error.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.distributed.mesh import leaf_name
from jaxrlhf.models.decoder import DecoderConfig

_LORA_SCALE = 2.0
# (pattern on the end of a leaf's name, how it is filled); floats only, the first that matches counts.
_FLOATS: tuple[tuple[str, str], ...] = (
    (r"\.(mu|nu)\..*", "zeros"),  # moments of an optimizer
    (r"kl_coef|moments/(count|mean|squares)", "zeros"),
    (r"lora_scale", "lora_scale"),
    (r"lora_a", "inputs"),
    (r"lora_b", "small"),  # zero at the start of a run; products of zeros are not timed
    (r"kernel_scale", "codes"),
    (r"score/kernel", "inputs"),
    (r"norm/scale", "norm"),
    (r"bias|margin", "zeros"),
    (r"kernel|embedding", "weights"),
    (r"weight", "ones"),  # of pairs of answers
    (r"temperature", "ones"),
    (r"\w*logprobs", "zeros"),
    (r"values|advantages|returns", "normal"),
    (r"\d+", "normal"),  # scores: an argument that has no name
)


class Filler:
    """Makes each shape an array once, however many programs are given it."""

    def __init__(self, model: DecoderConfig, seed: int):
        self.model, self.key = model, jax.random.key(seed)
        self._made: dict[int, tuple[jax.ShapeDtypeStruct, jax.Array]] = {}  # the shape is kept, so that its id is

    def fill(self, tree: Any) -> Any:
        """The tree with arrays for shapes, each where its sharding says; other leaves stay."""
        return jax.tree_util.tree_map_with_path(self._leaf, tree)

    def give(self, shapes: Any, arrays: Any) -> None:
        """These arrays stand for these shapes from now on: what a program gave is what the next one takes."""
        for leaf, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True):
            self._made[id(leaf)] = leaf, array

    def _leaf(self, path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if id(leaf) not in self._made:
            self._made[id(leaf)] = leaf, self._array(leaf_name(path), leaf)
        return self._made[id(leaf)][1]

    def _array(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return self.key
        kind = _kind(name, leaf.dtype)
        if kind == "norm":
            kind = "zeros" if self.model.norm == "rms_plus_one" else "ones"
        static = (kind, leaf.shape, jnp.dtype(leaf.dtype), self.model.vocab_size, self.model.initializer_range)
        return _program(leaf.sharding, *static)(self.key, np.uint32(len(self._made)))


def _kind(name: str, dtype: jnp.dtype) -> str:
    if dtype == jnp.bool_:
        return "ones"
    if dtype in (jnp.int8, jnp.uint8):
        return "bits"
    if jnp.issubdtype(dtype, jnp.integer):
        if re.search(r"(^|[./])(step|count)$", name):
            return "zeros"
        return "ones" if name.endswith("segments") else "tokens"
    for pattern, kind in _FLOATS:
        if re.search(rf"(^|[./\w])({pattern})$", name):
            return kind
    raise ValueError(f"no rule says what the array {name!r} holds")


@functools.cache
def _program(sharding: jax.sharding.Sharding | None, *static: Any) -> Any:
    """Equal leaves share one compiled program; each device makes its own share."""
    return jax.jit(functools.partial(_draw, *static), out_shardings=sharding)


def _draw(kind: str, shape: tuple[int, ...], dtype: jnp.dtype, vocabulary: int, spread: float, key: jax.Array, n):
    if kind in ("zeros", "ones"):
        return jnp.full(shape, kind == "ones", dtype)
    key = jax.random.fold_in(key, n)
    if kind == "tokens":
        return jax.random.randint(key, shape, 0, vocabulary, dtype)
    if kind == "bits":
        return jax.random.bits(key, shape, jnp.uint8).view(dtype)
    if kind == "lora_scale":
        return jnp.full(shape, _LORA_SCALE, dtype)
    scale = {
        "inputs": shape[0] ** -0.5 if shape else 1.0,
        "small": 0.01,
        "weights": spread,
        "codes": spread / 64.0,
        "normal": 1.0,
    }[kind]
    drawn = jax.random.normal(key, shape, jnp.float32) * scale
    return (jnp.abs(drawn) if kind == "codes" else drawn).astype(dtype)

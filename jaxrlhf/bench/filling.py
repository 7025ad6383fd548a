"""Makes random weights, tokens and scores for the programs that `stages.calls` describes by shapes.

The name of a leaf decides its contents and its sharding. A name without a rule is an error.
"""

import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.sharding import leaf_name

_INPUTS, _INITIAL = "one over the root of the inputs", "the model's initializer_range"
# (pattern for the end of a leaf's name, mean, standard deviation) for leaves of floats. The first match counts.
_FLOATS: tuple[tuple[str, float, float | str], ...] = (
    (r"\.(mu|nu)\..*|kl_coef|moments/(count|mean|squares)|bias|margin|\w*logprobs", 0.0, 0.0),
    (r"lora_scale", 2.0, 0.0),
    (r"lora_a|score/kernel", 0.0, _INPUTS),
    (r"lora_b", 0.0, 0.01),  # 0 at the start of a run, but products of zeros are too fast for a measurement
    (r"kernel_scale", 3e-4, 0.0),  # the scales of int8 codes, whose largest value is 127
    (r"norm/scale", 1.0, 0.0),
    (r"kernel|embedding", 0.0, _INITIAL),
    (r"weight|temperature", 1.0, 0.0),  # `weight` is the weight of a preference pair
    (r"values|advantages|returns|\d+", 0.0, 1.0),  # a number is the position of an argument without a name (scores)
)


class Filler:
    """Makes one array for each shape. Programs that share a shape object get the same array."""

    def __init__(self, model: DecoderConfig, seed: int):
        self.model, self.key = model, jax.random.key(seed)
        self.seconds = 0.0  # time to compile the random generators and to draw the arrays
        # id of a shape -> (the shape, its array). The shape stays alive, so no other object gets the same id.
        self._arrays: dict[int, tuple[jax.ShapeDtypeStruct, jax.Array]] = {}
        self._programs: dict[tuple, Any] = {}  # compiled generators; leaves with the same contents share a generator

    def fill(self, tree: Any) -> Any:
        """Returns the tree with an array instead of each shape. The array has the shape's sharding.

        Leaves that are not shapes are unchanged.
        """
        return jax.tree_util.tree_map_with_path(self._leaf, tree)

    def give(self, shapes: Any, arrays: Any) -> None:
        """Makes `fill` use `arrays` for `shapes`. So a program gets the results of an earlier program as input."""
        for leaf, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True):
            self._arrays[id(leaf)] = leaf, array

    def _leaf(self, path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return self.key
        if id(leaf) not in self._arrays:
            contents = (*self._contents(leaf_name(path), leaf), leaf.shape, jnp.dtype(leaf.dtype))
            start = time.perf_counter()
            if (contents, leaf.sharding) not in self._programs:  # each device makes its own shards
                draw = jax.jit(functools.partial(_draw, *contents), out_shardings=leaf.sharding)
                self._programs[contents, leaf.sharding] = draw.lower(self.key, np.uint32(0)).compile()
            draw = self._programs[contents, leaf.sharding]
            array = jax.block_until_ready(draw(self.key, np.uint32(len(self._arrays))))
            self.seconds += time.perf_counter() - start
            self._arrays[id(leaf)] = leaf, array
        return self._arrays[id(leaf)][1]

    def _contents(self, name: str, leaf: jax.ShapeDtypeStruct) -> tuple[str, float, float]:
        """Returns ("normal", mean, standard deviation), ("integers", low, high) or ("bits", 0, 0) for a leaf."""
        if leaf.dtype in (jnp.int8, jnp.uint8):
            return "bits", 0, 0
        if leaf.dtype == jnp.bool_ or name.endswith("segments"):
            return "integers", 1, 2
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return "integers", 0, 1 if re.search(r"(^|[./])(step|count)$", name) else self.model.vocab_size
        for pattern, mean, spread in _FLOATS:
            if re.search(rf"(^|[./\w])({pattern})$", name):
                mean = 0.0 if "norm/" in pattern and self.model.norm == "rms_plus_one" else mean
                by_name = {_INPUTS: (leaf.shape or (1,))[0] ** -0.5, _INITIAL: self.model.initializer_range}
                return "normal", mean, by_name.get(spread, spread)
        raise ValueError(f"there is no rule for the contents of the array {name!r}")


def _draw(kind: str, a: float, b: float, shape: tuple[int, ...], dtype: jnp.dtype, key: jax.Array, n: Any) -> jax.Array:
    key = jax.random.fold_in(key, n)
    if kind == "bits":
        return jax.random.bits(key, shape, jnp.uint8).view(dtype)
    if kind == "integers":
        return jax.random.randint(key, shape, a, b).astype(dtype)
    if b == 0:
        return jnp.full(shape, a, dtype)
    return (a + b * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

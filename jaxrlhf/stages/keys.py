"""One seed: every key is folded from (seed, stage, iteration, purpose)."""

import zlib

import jax


def key_for(seed: int, stage: str, iteration: int, purpose: str) -> jax.Array:
    """The key of one use. Names enter by their CRC-32, which is the same everywhere and always."""
    key = jax.random.key(seed)
    for part in (zlib.crc32(stage.encode()), iteration, zlib.crc32(purpose.encode())):
        key = jax.random.fold_in(key, part)
    return key

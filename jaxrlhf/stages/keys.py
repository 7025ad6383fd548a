"""Random keys. Every key is derived from (seed, stage, iteration, purpose)."""

import zlib

import jax


def key_for(seed: int, stage: str, iteration: int, purpose: str) -> jax.Array:
    """Returns the key for one purpose. Names are hashed with CRC-32, which is stable across processes and versions."""
    key = jax.random.key(seed)
    for part in (zlib.crc32(stage.encode()), iteration, zlib.crc32(purpose.encode())):
        key = jax.random.fold_in(key, part)
    return key

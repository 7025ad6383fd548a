"""Refuses sizes that do not fit in this machine's memory, before anything is allocated or written.

The memory is computed by simple formulas, which are lower bounds: a step needs at least this much. `jaxrlhf plan`
computes the real need.
"""

import os

import jax

from jaxrlhf.config import AdapterConfig, NewModelConfig, PPOStageConfig
from jaxrlhf.config.base import LARGEST
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import target_paths
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, linear_shapes

GIB = 2**30


def check_tokens_per_step(rows: int, length: int, key_path: str) -> None:
    """Raises `UserError` if a step has more tokens than 32-bit indices can count."""
    if rows * length > LARGEST:
        raise UserError(
            f"{key_path}: {rows} rows of {length} tokens are {rows * length:.3g} tokens in one step; give at most "
            f"{LARGEST // length} rows"
        )


def check_total_steps(steps: int, key_path: str) -> None:
    """Raises `UserError` if a stage has more optimizer steps than an int32 counter can count."""
    if steps > LARGEST:
        raise UserError(f"{key_path}: there would be {steps:.3g} optimizer steps; give at most {LARGEST}")


def check_new_model(new: NewModelConfig, vocabulary: int, itemsize: int, mesh: jax.sharding.Mesh | None) -> None:
    """Raises `UserError` if the weights of a new model do not fit in memory."""
    D, I = new.hidden_size, new.intermediate_size
    kv = D // new.heads * new.kv_heads
    weights = D * vocabulary + new.layers * (2 * D * D + 2 * D * kv + 3 * D * I)
    _check(weights * itemsize, mesh, "model.new", f"{weights:.3g} weights")


def check_lora(base: Decoder, config: AdapterConfig, mesh: jax.sharding.Mesh | None, key_path: str) -> None:
    """Raises `UserError` if an adapter's LoRA pairs and their optimizer state do not fit in memory."""
    shapes = linear_shapes(base)
    weights = config.rank * sum(sum(shapes[path]) for path in target_paths(base, config))
    _check(12 * weights, mesh, f"{key_path}.rank", f"{weights:.3g} weights of the adapter")


def check_rollout(config: PPOStageConfig, model: DecoderConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` if keys, values and tokens of a rollout do not fit in memory."""
    rows = config.batch_size * config.sampling.samples_per_prompt
    length = config.max_prompt_tokens + config.response_tokens
    window = max((kind.window or length for kind in model.layer_kinds), default=length)
    cached = 4 * model.layers * model.kv_heads * model.head_dim * min(window, length)  # bytes per row in 16 bits
    least = rows * (5 * length + cached + 24 * config.response_tokens)
    _check(least, mesh, "ppo.batch_size", f"a rollout of {rows} rows of {length} tokens")


def check_packed(rows: int, length: int, model: DecoderConfig, mesh: jax.sharding.Mesh, key_path: str) -> None:
    """Raises `UserError` if the hidden states of one layer, at 16 bits per number, do not fit in memory."""
    _check(2 * rows * length * model.hidden_size, mesh, key_path, f"a step of {rows} rows of {length} tokens")


def _check(needed: float, mesh: jax.sharding.Mesh | None, key_path: str, what: str) -> None:
    if needed > (room := memory(mesh)):
        raise UserError(
            f"{key_path}: {what} would take at least {needed / GIB:.3g} GiB, but there are only {room / GIB:.3g} GiB "
            "of memory; give a smaller value"
        )


def memory(mesh: jax.sharding.Mesh | None) -> float:
    """Returns the bytes of memory of all devices of the mesh.

    Without a mesh, returns the memory of this host's devices. CPUs report no memory of their own. For CPUs the result
    is the memory of this host times the number of processes: the memory of all hosts, if each has as much as this host.
    """
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    stats = devices[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit * (len(devices) if mesh is None else mesh.size)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()

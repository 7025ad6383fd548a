"""Fingerprints of what a run began with: model, tokenizer, rows and reward code, in RUN/fingerprints.json.

Settings say where these inputs are, not what they contain. If the model, the tokenizer or a data set has changed, the
run is not resumed, and the error names the changed input. If a reward has changed, the run prints a line and continues:
users may correct their reward functions.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.config import (
    ClassifierRewardConfig,
    FunctionRewardConfig,
    ModelRewardConfig,
    PPOStageConfig,
    RunConfig,
    SumRewardConfig,
)
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError
from jaxrlhf.hf.tensor_files import read_json
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.stages.roles import Roles

FILE = "fingerprints.json"
_SAMPLE = 1 << 16  # number of bytes read at the start and at the end of a file
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_ODD = (2654435761, 2246822519, 3266489917, 668265263)  # multipliers of xxHash, one per axis
_REWARDS = ("ppo.reward", "ppo.gold", "ppo.environment")  # a change of these inputs is reported, not refused


def fingerprint(tree: Any) -> str:
    """Returns 64 bits in hex that depend on every bit of a tree's arrays and on their paths, not on their sharding."""
    found = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        bits = int(fetch(_bits(leaf)))  # only one program runs at a time; see `finite_leaves`
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {bits}\n".encode())
    return found.hexdigest()


@jax.jit
def _bits(x: jax.Array) -> jax.Array:
    """Returns a checksum u32[] of an array's bits: a weighted sum of its words modulo 2^32.

    The weight of a word is an odd number that depends on the word's position.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    weights = sum(
        jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(_ODD[axis]) for axis in range(words.ndim)
    )
    return jnp.sum(words * (2 * jnp.uint32(weights) + 1), dtype=jnp.uint32)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the fingerprint of vocabulary, special tokens and chat template.

    The rules that split text are not included. If they change, the fingerprints of the token rows change.
    """
    fast = tokenizer.fast
    special = [tokenizer.special_ids, tokenizer.eos_id, tokenizer.pad_id]
    return _digest(json.dumps([sorted(fast.get_vocab().items()), special, fast.chat_template]))


def fingerprints(config: RunConfig, roles: Roles, inputs: Mapping[str, Any]) -> dict[str, str]:
    """Returns the fingerprints of everything that the run reads now: name for messages -> fingerprint.

    All processes must call this function. Roles that the run made itself are left out, because their folders have
    checksums. Finished stages are left out too.
    """
    own = Path(config.run_dir) / "roles"
    found = {} if (own / "base").is_dir() else {"model": fingerprint(named_parameters(roles.base))}
    inherited = {name: tree for name, tree in roles.adapters.items() if not (own / name).is_dir()}
    found |= {f"{name} adapter of model.run": fingerprint(tree) for name, tree in inherited.items()}
    found["tokenizer"] = tokenizer_fingerprint(roles.tokenizer)
    for stage, read in inputs.items():
        for name, value in vars(read).items():
            if hasattr(value, "checksum"):
                found[f"{name} rows of {stage}"] = value.checksum()
            elif isinstance(value, dict) and name in ("policy", "reference"):
                found[f"adapter at {stage}.{name}"] = fingerprint(value)
    return found | (_rewards(config.ppo) if "ppo" in inputs else {})


def check_fingerprints(run_dir: Path, now: Mapping[str, str]) -> list[str]:
    """Returns a line for each reward that has changed since the run began.

    Raises `UserError` if anything else has changed. A name is compared only if both the run and `now` have it.
    """
    before = read_fingerprints(run_dir)
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    for name in changed:
        if not name.startswith(_REWARDS):
            raise UserError(
                f"run_dir {run_dir}: the {name} changed since the run began; restore the earlier state, or give "
                "another run_dir"
            )
    return [f"run_dir {run_dir}: {name} changed since the run began; the run continues with it" for name in changed]


def read_fingerprints(run_dir: Path) -> dict[str, str]:
    """Returns the saved fingerprints of a run; empty if there are none yet."""
    path = Path(run_dir) / FILE
    return read_json(path) if path.is_file() else {}


def record_fingerprints(run_dir: Path, now: Mapping[str, str]) -> None:
    """Writes the fingerprints `now`. Saved fingerprints of stages whose inputs were not read this time are kept."""
    text = json.dumps({**read_fingerprints(run_dir), **now}, indent=1, sort_keys=True) + "\n"
    atomic_write(Path(run_dir) / FILE, text)


def _rewards(config: PPOStageConfig) -> dict[str, str]:
    """Returns key path -> fingerprint of the source file or model folder of the reward or of the environment.

    Reward servers have no fingerprint.
    """
    parts = {"ppo.reward": config.reward}
    if isinstance(config.reward, SumRewardConfig):
        parts = {f"ppo.reward.parts.{name}": part for name, part in config.reward.parts.items()}
    found = {}
    for key_path, part in parts.items():
        if isinstance(part, FunctionRewardConfig):
            found[key_path] = _source_fingerprint(part.function)
        elif isinstance(part, ModelRewardConfig | ClassifierRewardConfig) and part.path is not None:
            found[key_path] = _folder_fingerprint(Path(part.path))
    if config.environment is not None:
        found["ppo.environment"] = _source_fingerprint(config.environment.factory)
    if config.gold is not None:
        found["ppo.gold"] = _source_fingerprint(config.gold)
    return {key_path: text for key_path, text in found.items() if text}


def _digest(text: str | bytes) -> str:
    return hashlib.blake2b(text.encode() if isinstance(text, str) else text, digest_size=8).hexdigest()


def _source_fingerprint(spec: str) -> str | None:
    """Returns the fingerprint of the file that defines `path.py:name` or `module:name`, or None if there is no file."""
    where = spec.rpartition(":")[0]
    file = where if where.endswith(".py") else getattr(sys.modules.get(where), "__file__", None)
    return _digest(Path(file).read_bytes()) if file is not None and Path(file).is_file() else None


def _folder_fingerprint(folder: Path) -> str | None:
    """Returns the fingerprint of the names, sizes, first and last bytes of a folder's files; None for a hub id."""
    if not folder.is_dir():
        return None
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        # transformers rewrites tokenizer_config.json when it reads the file
        if path.suffix in (".json", ".safetensors") and path.name != "tokenizer_config.json":
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(_SAMPLE)
                file.seek(max(size - _SAMPLE, 0))
                found.update(f"{path.name} {size}".encode() + start + file.read())
    return found.hexdigest()

"""Checkpoints of one stage, and all that the package knows of orbax.

A tree is stored as a flat table: one array per leaf under its path ("policy/layers.0.attention.q_proj/lora_a"),
and a JSON record with the table of contents and the leaves that are plain Python numbers or text. Structure is
never stored: `restore` takes it from the tree that the resumed run has built anyway, and compares.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # where v1 has not left `experimental`
    from orbax.checkpoint.experimental import v1 as ocp

from jaxrlhf.errors import UserError


class Checkpoints:
    """The last `keep` checkpoints under `directory`, by step.

    Leaves are jax or numpy arrays, Python numbers, bools and text. A checkpoint appears under its step when it is
    complete; what a killed process left half-written is removed here. On several hosts every process makes one
    and calls it alike.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports each phase of each save
        policies = ocp.training.preservation_policies
        self._directory = Path(directory).absolute()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                # Orbax's own cleaning overlooks a folder that was killed before it got its metadata file.
                for leftover in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(leftover)
        except OSError as error:
            raise UserError(f"{directory}: checkpoints cannot be written there: {error.strerror}") from None
        self._orbax = ocp.training.Checkpointer(self._directory, preservation_policy=policies.LatestN(keep))

    def save(self, step: int, tree: Any) -> None:
        """Starts to save; the caller may donate or change every leaf right after.

        Waits for the save before it, and raises what that one ran into. Saving a step again is an error
        (`ValueError`), except for the latest: a run is deterministic, so it would be the same.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step == latest:
                return
            raise ValueError(f"step {step} is not after the latest checkpoint, {latest}")
        leaves = _named_leaves(tree)
        arrays = {name: _storable(leaf) for name, leaf in leaves.items() if _is_array(leaf) and _size(leaf)}
        record = {
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "values": {name: json.dumps(leaf) for name, leaf in leaves.items() if not _is_array(leaf)},
        }
        # Orbax stores no tree without arrays: the step itself is always there.
        self._orbax.save_async(step, {"arrays": arrays, "step": np.asarray(step)}, force=True, custom_metadata=record)

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what went wrong."""
        self._orbax.wait()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, after waiting for a save under way."""
        self.wait()
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def restore(self, step: int, like: Any) -> Any:
        """The tree saved at `step`, in the structure of `like` and with its placement.

        `like` holds arrays or `jax.ShapeDtypeStruct`s; one without a sharding goes to the first device. Raises
        `UserError` where the checkpoint is missing or damaged, or a leaf's name, shape or type differs (the first
        is named).
        """
        self.wait()
        folder = self._directory / str(step)
        if step not in [checkpoint.step for checkpoint in self._orbax.checkpoints]:
            raise UserError(f"{folder}: there is no checkpoint of step {step}; the latest is {self.latest_step()}")
        leaves = _named_leaves(like)
        wanted = {name: _wanted(leaf) for name, leaf in leaves.items() if _is_array(leaf) and _size(leaf)}
        try:
            record = self._orbax.metadata(step).custom_metadata
            _compare(folder, record["leaves"], {name: _describe(leaf) for name, leaf in leaves.items()})
            stored = self._orbax.load(step, {"arrays": wanted, "step": np.zeros((), np.asarray(step).dtype)})["arrays"]
        except UserError:
            raise
        except Exception as error:  # orbax wraps what the disk said in exceptions of many types
            raise UserError(
                f"{folder}: the checkpoint cannot be read ({_innermost(error)}); remove this folder to go on from the "
                "one before"
            ) from error
        values = {name: json.loads(text) for name, text in record["values"].items()}
        empty = {name: _empty(leaf) for name, leaf in leaves.items() if _is_array(leaf) and not _size(leaf)}
        found = {**stored, **values, **empty}
        found |= {name: found[name][()] for name, leaf in leaves.items() if isinstance(leaf, np.generic)}
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in leaves])

    def close(self) -> None:
        """Waits for what was saved, then lets go of orbax's threads."""
        self._orbax.wait()
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two leaves of the tree have the same path")
    for name, leaf in named.items():
        if not (_is_array(leaf) or isinstance(leaf, bool | int | float | str)):
            raise ValueError(f"leaf {name} is a {type(leaf).__name__}; a checkpoint holds arrays, numbers and text")
    return named


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))  # orbax stores no empty arrays


def _storable(leaf: Any) -> Any:
    # A jax array that is donated while it is being written is kept alive by jax; a numpy array would change.
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _describe(leaf: Any) -> str:
    """Type and shape of a leaf, such as "float32[64,8]" or "int"."""
    if not _is_array(leaf):
        return type(leaf).__name__
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _wanted(leaf: Any) -> Any:
    """What orbax is told to make of a stored array: a numpy array, or a jax array with a placement."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def _compare(folder: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises `UserError` at the first leaf that differs."""
    for name in [*wanted, *(name for name in stored if name not in wanted)]:
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"{folder}: {name} is {stored.get(name, 'absent')} in the checkpoint, this run needs it to be "
                f"{wanted.get(name, 'absent')}; use the settings that the checkpoint was made with, or another run_dir"
            )


def _innermost(error: BaseException) -> str:
    """The first line of the exception that started it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else text[:197] + "..."

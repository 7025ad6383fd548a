"""Checkpoints of one stage, and all that the package knows of orbax.

A tree is stored as a flat table: one array per leaf under its path ("policy/layers.0.attention.q_proj/lora_a"),
and a record with the table of contents, the leaves that are plain Python numbers or text, and the checksum of every
file. Structure is never stored: `restore` takes it from the tree that the resumed run has built anyway, and compares.

    DIRECTORY/120/           complete, and written to disk, before it has this name
    DIRECTORY/120.damaged/   was not what had been saved when a run went on; nothing reads or removes it
    DIRECTORY/latest.json    the last step that was saved here, so that missing checkpoints are noticed
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # where v1 has not left `experimental`
    from orbax.checkpoint.experimental import v1 as ocp

from jaxrlhf.checkpoint.checksums import Damaged, seal, unseal
from jaxrlhf.checkpoint.files import atomic_write, reason, sync
from jaxrlhf.distributed.processes import largest, of_first
from jaxrlhf.errors import Fault, UserError

_LATEST = "latest.json"
_LEFTOVERS = ("*.saving", "*.removing", "*.orbax-checkpoint-tmp*", ".*.tmp")


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best score so far."""

    step: int
    score: float


@dataclass(frozen=True)
class Restored:
    """A checkpoint as it was found."""

    step: int
    tree: Any
    notes: dict[str, Any] = field(default_factory=dict)  # as given to `save`


@dataclass(frozen=True)
class _Saving:
    """A save under way, and what is there when it is done."""

    step: int
    written: Future
    steps: list[int]
    best: Best | None

    @property
    def failed(self) -> bool:
        return self.written.done() and self.written.exception() is not None


class Checkpoints:
    """The last `keep` checkpoints under `directory`, by step, and the one with the best score.

    Leaves are jax or numpy arrays, Python numbers, bools and text. A checkpoint appears under its step when it is
    complete, with a checksum of each file; what a killed process left half-written is removed here. `scored` names
    what scores measure: those of another name are forgotten. On several hosts every process makes one and calls it
    alike; they see the same directory.
    """

    def __init__(self, directory: str | Path, keep: int = 2, scored: str = "", lowest_is_best: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports each phase, and each error many times
        self._directory = Path(directory).absolute()
        self._keep, self._scored, self._sign = keep, scored, -1 if lowest_is_best else 1
        self._first = jax.process_index() == 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for leftover in [path for pattern in _LEFTOVERS for path in self._directory.glob(pattern)] * self._first:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self._steps = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
        except OSError as error:
            raise UserError(f"{directory}: checkpoints cannot be written there: {error.strerror}") from None
        self._best: Best | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._saving: _Saving | None = None

    # ------------------------------------------------------------ saving

    def save(self, step: int, tree: Any, score: float | None = None, notes: dict[str, Any] | None = None) -> None:
        """Starts to save; the caller may donate or change every leaf right after.

        `notes` is JSON that `restore_latest` gives back. Waits for the save before it, and raises what that one ran
        into. Saving a step again is an error (`ValueError`), except for the latest: a run is deterministic, so it
        would be the same.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step == latest:
                return
            raise ValueError(f"step {step} is not after the latest checkpoint, {latest}")
        leaves = _named_leaves(tree)
        arrays = {name: _storable(leaf) for name, leaf in leaves.items() if _is_array(leaf) and _size(leaf)}
        best = self._better(step, score)
        record = {
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "values": {name: json.dumps(leaf) for name, leaf in leaves.items() if not _is_array(leaf)},
            "best": best and [self._scored, self._sign, best.step, best.score],
            "notes": notes or {},
        }
        steps = [*self._steps, step]
        kept = {*steps[-self._keep :], best and best.step}
        try:
            # Orbax stores no tree without arrays: the step itself is always there.
            stored = {"arrays": arrays, "step": np.asarray(step)}
            response = ocp.save_async(self._directory / f"{step}.saving", stored, overwrite=True)
            written = self._writer.submit(self._complete, step, response, record, sorted(set(steps) - kept))
        except Exception as error:  # orbax wraps what the disk said in exceptions of many types
            written = Future()
            written.set_exception(error)
        self._saving = _Saving(step, written, [step for step in steps if step in kept], best)

    def _better(self, step: int, score: float | None) -> Best | None:
        """The best checkpoint when this one is there too; the earlier of two that are equal."""
        if score is None or not math.isfinite(score):
            return self._best
        if self._best is not None and self._sign * score <= self._sign * self._best.score:
            return self._best
        return Best(step, score)

    def _complete(self, step: int, response: Any, record: dict[str, Any], old: list[int]) -> None:
        """In a thread of its own: seals what orbax has written, gives it its name, and removes what is too old."""
        response.result()  # returns when every process has written its part
        if not self._first:
            return
        folder = self._directory / f"{step}.saving"
        seal(folder, record)
        os.replace(folder, self._directory / str(step))
        sync(self._directory)
        atomic_write(self._directory / _LATEST, json.dumps({"step": step}) + "\n")
        for name in map(str, old):
            retired = self._directory / f"{name}.removing"  # a kill in the middle leaves no half under the step
            with contextlib.suppress(OSError):  # one checkpoint too many is no reason to stop
                os.replace(self._directory / name, retired)
                shutil.rmtree(retired)

    @property
    def failed(self) -> bool:
        """Whether a save of this process has gone wrong; `wait` says how."""
        return self._saving is not None and self._saving.failed

    @property
    def on_disk(self) -> int | None:
        """The newest complete checkpoint's step as far as this process knows; does not wait."""
        if self._saving is not None and self._saving.written.done() and not self._saving.failed:
            return self._saving.step
        return max(self._steps, default=None)

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises `Fault` on every process where it could not be written."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        error = saving.written.exception()
        if largest(int(error is not None)):
            for partial in [*self._directory.glob(f"{saving.step}.saving*")] * self._first:
                shutil.rmtree(partial, ignore_errors=True)  # room for what comes next
            why = "another process could not write its part" if error is None else reason(error)
            before = f"that of step {self._steps[-1]} is whole" if self._steps else "there is none before it"
            raise Fault(f"{self._directory}: the checkpoint of step {saving.step} cannot be written: {why}; {before}")
        self._steps, self._best = saving.steps, saving.best

    # ------------------------------------------------------------ reading

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, after waiting for a save under way."""
        self.wait()
        return max(self._steps, default=None)

    def best(self) -> Best | None:
        """The checkpoint with the best score, after waiting for a save under way; None where it is no longer there."""
        self.wait()
        return self._best if self._best is not None and self._best.step in self._steps else None

    def restore(self, step: int, like: Any) -> Any:
        """The tree saved at `step`, in the structure of `like` and with its placement.

        `like` holds arrays or `jax.ShapeDtypeStruct`s; one without a sharding goes to the first device. Raises
        `UserError` where the checkpoint is missing or damaged, or a leaf's name, shape or type differs (the first
        is named).
        """
        latest, folder = self.latest_step(), self._directory / str(step)
        if step not in self._steps:
            raise UserError(f"{folder}: there is no checkpoint of step {step}; the latest is {latest}")
        try:
            return self._read(step, like)[0]
        except Damaged as damage:
            raise UserError(
                f"{folder}: damaged: {damage}; restore this folder, or remove it to do without this checkpoint"
            ) from None

    def restore_latest(self, like: Any, say: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint that is whole; None where none was ever saved. `like` is as in `restore`.

        A damaged one is told through `say` and set aside, and the one before it counts. Raises `UserError` where
        checkpoints were saved but none can be used: they stay as they are.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for place in range(of_first(len(self._steps))):
            step = of_first(self._steps[-1 - place])
            try:
                tree, record = self._read(step, like)
                break
            except Damaged as damage:
                damaged[step] = str(damage)
        else:
            self._check_none_lost(damaged)
            return None
        last = self._last_saved()
        if not damaged and last is not None and last > step:
            say(f"{self._directory}: the checkpoint of step {last} is gone; goes on from step {step}")
        if last == 0:
            say(f"{self._directory / _LATEST}: damaged: later checkpoints may be gone; goes on from step {step}")
        for number, what in damaged.items():
            folder = self._directory / str(number)
            say(f"{folder}: damaged: {what}; set aside as {number}.damaged; goes on from step {step}")
            if self._first:
                shutil.rmtree(folder.with_name(f"{number}.damaged"), ignore_errors=True)
                os.replace(folder, folder.with_name(f"{number}.damaged"))
        if damaged and self._first:
            sync(self._directory)
        self._steps = [number for number in self._steps if number <= step]
        scored, sign, *best = record["best"] or ("", 0)
        self._best = Best(*best) if (scored, sign) == (self._scored, self._sign) else None
        return Restored(step, tree, record["notes"])

    def _check_none_lost(self, damaged: dict[int, str]) -> None:
        """`UserError` where this directory has had checkpoints, and none of them is left."""
        last = self._last_saved()
        if last is None and not damaged:
            return
        what = "; ".join(f"step {step}: {what}" for step, what in damaged.items())
        gone = f"a checkpoint {f'of step {last} ' if last else ''}was here, and none is left"
        found = f"every checkpoint is damaged ({what})" if damaged else gone
        raise UserError(
            f"{self._directory}: {found}; restore one of them from a copy, or remove this directory to begin the stage "
            "again, or give another run_dir"
        )

    def _last_saved(self) -> int | None:
        """The last step that was ever saved here; None where that is not known."""
        try:
            return int(json.loads((self._directory / _LATEST).read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # something was, and nobody knows what

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(tree, record). Every process reads a share of the files, and all come to the same end.

        Raises `Damaged` where the folder is not what was saved, and `UserError` where it is, but not for this run.
        """
        folder, record, what, error = self._directory / str(step), {}, "", None
        try:
            record = unseal(folder, jax.process_index(), jax.process_count())
        except Damaged as damage:
            what = str(damage)
        except OSError as fault:
            error = fault
        worst = largest(2 if error is not None else 1 if what else 0)
        if worst == 1:
            raise Damaged(what or "as another process has found")
        if worst == 2:
            raise UserError(f"{folder}: the checkpoint cannot be read: {error and reason(error)}; make it readable")
        leaves = _named_leaves(like)
        wanted = {name: _wanted(leaf) for name, leaf in leaves.items() if _is_array(leaf) and _size(leaf)}
        _compare(folder, record["leaves"], {name: _describe(leaf) for name, leaf in leaves.items()})
        try:
            stored = ocp.load(folder, {"arrays": wanted, "step": np.zeros((), np.asarray(step).dtype)})["arrays"]
        except Exception as fault:  # orbax wraps what the disk said in exceptions of many types
            raise UserError(
                f"{folder}: the checkpoint is whole, but cannot be read ({reason(fault)}); use the versions of jax and "
                "orbax-checkpoint that it was made with"
            ) from fault
        values = {name: json.loads(text) for name, text in record["values"].items()}
        empty = {name: _empty(leaf) for name, leaf in leaves.items() if _is_array(leaf) and not _size(leaf)}
        found = {**stored, **values, **empty}
        found |= {name: found[name][()] for name, leaf in leaves.items() if isinstance(leaf, np.generic)}
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in leaves]), record

    def close(self) -> None:
        """Waits for what was saved, then lets go of the thread that wrote it."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

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
    """The form in which orbax returns a stored array: a numpy array, or a jax array with its sharding."""
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

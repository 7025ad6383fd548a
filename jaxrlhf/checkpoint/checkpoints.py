"""Checkpoints of one stage. Only this file uses orbax.

A checkpoint of a tree consists of arrays and a record. Each array is stored under the path of its leaf, such as
"policy/layers.0.attention.q_proj/lora_a". The record holds the type and shape of every leaf, the leaves that are Python
numbers or text, and the checksum of every file. The structure of the tree is not stored. `restore` takes the structure
from its argument `like` and compares the leaves.

    DIRECTORY/120/           a checkpoint; it gets this name when it is complete and synced to disk
    DIRECTORY/120.damaged/   a checkpoint that had wrong checksums when a run resumed; never read or removed
    DIRECTORY/latest.json    the step of the latest save, so that missing checkpoints are noticed
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # orbax versions with v1 under `experimental`
    from orbax.checkpoint.experimental import v1 as ocp

from jaxrlhf.checkpoint.checksums import Damaged, seal, unseal
from jaxrlhf.checkpoint.files import atomic_write, reason, sync
from jaxrlhf.checkpoint.leaves import abstract, compare, describe, is_array, named_leaves, parse
from jaxrlhf.distributed.processes import from_first, largest
from jaxrlhf.errors import Fault, UserError

_LATEST = "latest.json"
_LEFTOVERS = ("*.saving", "*.removing", "*.orbax-checkpoint-tmp*", ".*.tmp")


@dataclass(frozen=True)
class Best:
    """The step and score of the checkpoint with the best score."""

    step: int
    score: float


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint."""

    step: int
    tree: Any
    notes: dict[str, Any]  # the notes that were given to `save`


@dataclass(frozen=True)
class _Saving:
    """A save in progress. `steps` and `best` describe the checkpoints that are on disk after this save."""

    step: int
    written: Future
    steps: list[int]
    best: Best | None


class Checkpoints:
    """Saves and restores checkpoints in `directory`. The last `keep` checkpoints and the best one are kept.

    Leaves are jax or numpy arrays, Python numbers, bools and text. The name of a checkpoint's folder is its step. The
    folder gets this name when the checkpoint is complete. A new `Checkpoints` object removes the incomplete checkpoints
    of a killed process.
    `scored` is the name of the metric that gives the scores. A best checkpoint that was chosen by another metric is
    ignored. On several hosts, every process creates a `Checkpoints` for the same directory and makes the same calls.
    """

    def __init__(self, directory: str | Path, keep: int = 2, scored: str = "", lowest_is_best: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs each phase, and each error many times
        self._directory = Path(directory).absolute()
        self._keep, self._scored, self._sign = keep, scored, -1 if lowest_is_best else 1
        self._first = jax.process_index() == 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for leftover in [path for pattern in _LEFTOVERS for path in self._directory.glob(pattern)] * self._first:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self._steps = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
        except OSError as error:
            raise UserError(f"{directory}: checkpoints cannot be written to this folder: {error.strerror}") from None
        self._best: Best | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._saving: _Saving | None = None

    def save(self, step: int, tree: Any, score: float | None = None, notes: dict[str, Any] | None = None) -> None:
        """Starts a save. When the method returns, the caller may donate or change every leaf.

        `notes` are JSON values that `restore_latest` returns. The method first waits for the previous save and raises
        the error of that save. A second save of the latest step does nothing, because a run is deterministic. An
        earlier step raises `ValueError`.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step == latest:
                return
            raise ValueError(f"step must be greater than {latest}, the step of the latest checkpoint, not {step}")
        leaves = named_leaves(tree)
        # jax keeps a donated array until it is written. A numpy array is copied, because the caller may change it.
        arrays = {
            name: leaf if isinstance(leaf, jax.Array) else np.array(leaf)
            for name, leaf in leaves.items()
            if is_array(leaf) and math.prod(leaf.shape)
        }
        best, scored = self._best, score is not None and math.isfinite(score)
        if scored and (best is None or self._sign * score > self._sign * best.score):
            best = Best(step, score)
        record = {
            "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
            "values": {name: json.dumps(leaf) for name, leaf in leaves.items() if not is_array(leaf)},
            "best": best and [self._scored, self._sign, best.step, best.score],
            "notes": notes or {},
        }
        steps = [*self._steps, step]
        kept = {*steps[-self._keep :], best and best.step}
        try:
            # Orbax cannot store a tree without arrays, so the step is stored as an array.
            stored = {"arrays": arrays, "step": np.asarray(step)}
            response = ocp.save_async(self._directory / f"{step}.saving", stored, overwrite=True)
            written = self._writer.submit(self._complete, step, response, record, sorted(set(steps) - kept))
        except Exception as error:  # orbax wraps disk errors in exceptions of many types
            written = Future()
            written.set_exception(error)
        self._saving = _Saving(step, written, [step for step in steps if step in kept], best)

    def _complete(self, step: int, response: Any, record: dict[str, Any], old: list[int]) -> None:
        """Waits until orbax has written a checkpoint, adds checksums, and gives the folder its final name.

        Then old checkpoints are removed. This method runs in another thread.
        """
        response.result()  # returns when every process has written its part
        if not self._first:
            return
        folder = self._directory / f"{step}.saving"
        seal(folder, record)
        os.replace(folder, self._directory / str(step))
        sync(self._directory)
        atomic_write(self._directory / _LATEST, json.dumps({"step": step}) + "\n")
        for name in map(str, old):
            removing = self._directory / f"{name}.removing"  # so that no partial checkpoint keeps the name of the step
            with contextlib.suppress(OSError):  # an old checkpoint that stays does no harm
                os.replace(self._directory / name, removing)
                shutil.rmtree(removing)

    @property
    def failed(self) -> bool:
        """Whether the current save has failed on this process. `wait` raises the error of the save."""
        saving = self._saving
        return saving is not None and saving.written.done() and saving.written.exception() is not None

    @property
    def on_disk(self) -> int | None:
        """The step of the newest checkpoint that is complete. This property does not wait for the current save."""
        saving = self._saving
        complete = saving is not None and saving.written.done() and not self.failed
        return saving.step if complete else max(self._steps, default=None)

    def wait(self) -> None:
        """Waits for the current save. Raises `Fault` on every process if the checkpoint could not be written."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        error = saving.written.exception()
        if largest(int(error is not None)):
            for partial in [*self._directory.glob(f"{saving.step}.saving*")] * self._first:
                shutil.rmtree(partial, ignore_errors=True)  # frees the space
            why = "another process could not write its part" if error is None else reason(error)
            last = self._steps[-1] if self._steps else None
            before = "there is no earlier checkpoint" if last is None else f"the checkpoint of step {last} is complete"
            raise Fault(f"{self._directory}: the checkpoint of step {saving.step} cannot be written: {why}; {before}")
        self._steps, self._best = saving.steps, saving.best

    def latest_step(self) -> int | None:
        """Waits for the current save, and returns the step of the newest checkpoint, or None."""
        self.wait()
        return max(self._steps, default=None)

    def best(self) -> Best | None:
        """Waits for the current save, and returns the checkpoint with the best score.

        Returns None if this checkpoint is not on disk.
        """
        self.wait()
        return self._best if self._best is not None and self._best.step in self._steps else None

    def restore(self, step: int, like: Any) -> Any:
        """Returns the tree that was saved at `step`, with the structure and shardings of `like`.

        The leaves of `like` are arrays or `jax.ShapeDtypeStruct`s. A leaf without a sharding goes to the first device.
        Raises `UserError` if the checkpoint is missing or damaged. Also raises `UserError` if the name, shape or dtype
        of a leaf differs from `like`. This error names the first leaf that differs.
        """
        latest, folder = self.latest_step(), self._directory / str(step)
        if step not in self._steps:
            raise UserError(f"{folder}: there is no checkpoint of step {step}; the latest checkpoint has step {latest}")
        try:
            return self._read(step, like)[0]
        except Damaged as damage:
            raise _spoilt(folder, damage) from None

    def restore_latest(self, like: Any, say: Callable[[str], None]) -> Restored | None:
        """Restores the newest undamaged checkpoint. Returns None if no checkpoint was ever saved.

        `restore` explains `like`. Newer checkpoints that are damaged are reported with `say` and renamed. Raises
        `UserError` if checkpoints were saved but none can be used. The files are then unchanged.
        """
        self.wait()
        steps = json.loads(from_first(lambda: json.dumps(self._steps).encode()))
        try:
            last = int(json.loads((self._directory / _LATEST).read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            last = None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            last = 0  # a checkpoint was saved, but its step is unknown
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                tree, record = self._read(step, like)
                break
            except Damaged as damage:
                damaged[step] = str(damage)
        else:
            if last is None and not damaged:
                return None
            what = f"a checkpoint {f'of step {last} ' if last else ''}was saved here, but no checkpoint is left"
            if damaged:
                what = f"every checkpoint is damaged ({'; '.join(f'step {n}: {text}' for n, text in damaged.items())})"
            raise UserError(
                f"{self._directory}: {what}; restore a checkpoint from a backup, or give another run_dir"
            )
        if not damaged and last is not None and last > step:
            say(f"{self._directory}: the checkpoint of step {last} is missing; the run resumes from step {step}")
        if last == 0:
            say(
                f"{self._directory / _LATEST}: this file is damaged; later checkpoints may be missing; the run resumes "
                f"from step {step}"
            )
        for number, text in damaged.items():
            folder = self._directory / str(number)
            say(
                f"{folder}: this checkpoint is damaged: {text}; its new name is {number}.damaged; the run resumes from "
                f"step {step}"
            )
            if self._first:
                shutil.rmtree(folder.with_name(f"{number}.damaged"), ignore_errors=True)
                os.replace(folder, folder.with_name(f"{number}.damaged"))
                sync(self._directory)
        self._steps = [number for number in steps if number <= step]
        scored, sign, *best = record["best"] or ("", 0)
        self._best = Best(*best) if (scored, sign) == (self._scored, self._sign) else None
        return Restored(step, tree, record["notes"])

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Checks the files of the checkpoint of `step` and returns (tree, record).

        Raises `Damaged` if a checksum is wrong. Raises `UserError` if the files cannot be read or if the leaves differ
        from `like`.
        """
        folder = self._directory / str(step)
        record = _checked_record(folder)
        leaves = named_leaves(like)
        compare(folder, record["leaves"], {name: describe(leaf) for name, leaf in leaves.items()})
        arrays = {name: abstract(leaf) for name, leaf in leaves.items() if is_array(leaf)}
        stored = {name: leaf for name, leaf in arrays.items() if math.prod(leaf.shape)}  # orbax stores no empty arrays
        loaded = _load_arrays(folder, stored)
        values = {name: json.loads(text) for name, text in record["values"].items()}

        def value(name: str, leaf: Any) -> Any:
            if name in values:
                return values[name]
            if name in loaded:
                return loaded[name][()] if isinstance(leaf, np.generic) else loaded[name]
            empty = np.empty(leaf.shape, leaf.dtype)
            return empty if isinstance(leaf, np.ndarray) else jax.device_put(empty, arrays[name].sharding)

        return jax.tree.unflatten(jax.tree.structure(like), [value(*item) for item in leaves.items()]), record

    def close(self) -> None:
        """Waits for the current save, and then ends the thread that writes checkpoints."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stored_steps(directory: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, in order.

    The list is empty if the folder does not exist.
    """
    try:
        return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{directory}: the folder cannot be read: {error.strerror}; make it readable") from None


def stored_best(directory: str | Path, scored: str, lowest_is_best: bool = False) -> int | None:
    """Returns the step of the checkpoint with the best score of the metric `scored`, or None.

    The newest checkpoint records this step. Raises `UserError` if the newest checkpoint is damaged.
    """
    steps = stored_steps(directory)
    best = _undamaged_record(Path(directory) / str(steps[-1]))["best"] if steps else None
    if best is None or best[:2] != [scored, -1 if lowest_is_best else 1]:
        return None
    return best[2] if best[2] in steps else None


def stored_arrays(directory: str | Path, step: int, above: str) -> dict[str, jax.Array]:
    """Returns the arrays of a checkpoint that have a path below `above`. The keys are the paths without `above`.

    Other arrays are not read. The arrays are on the first device. Raises `UserError` if the checkpoint is damaged or
    cannot be read.
    """
    folder = Path(directory).absolute() / str(step)
    leaves = _undamaged_record(folder)["leaves"]
    below = {name: parse(text) for name, text in leaves.items() if name.startswith(f"{above}/") and text.endswith("]")}
    stored = {name: abstract(leaf) for name, leaf in below.items() if math.prod(leaf.shape)}
    arrays = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in below.items() if name not in stored}
    if stored:
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # orbax then reads only the requested arrays
        with context:
            arrays |= _load_arrays(folder, stored)
    return {name.removeprefix(f"{above}/"): arrays[name] for name in below}


def _checked_record(folder: Path) -> dict[str, Any]:
    """Checks the files of a checkpoint and returns its record.

    Each process checks a share of the files, and all processes raise the same type of error. `Damaged` means that a
    checksum is wrong. `UserError` means that the files cannot be read.
    """
    record, damage, error = {}, "", None
    try:
        record = unseal(folder, jax.process_index(), jax.process_count())
    except Damaged as raised:
        damage = str(raised)
    except OSError as raised:
        error = raised
    worst = largest(2 if error is not None else 1 if damage else 0)
    if worst == 1:
        raise Damaged(damage or "another process found the damage")
    if worst == 2:
        raise UserError(f"{folder}: the checkpoint cannot be read: {error and reason(error)}; make it readable")
    return record


def _undamaged_record(folder: Path) -> dict[str, Any]:
    """Checks the files of a checkpoint and returns its record. Raises `UserError` if a file has changed."""
    try:
        return _checked_record(folder)
    except Damaged as damage:
        if not folder.exists():
            raise UserError(f"{folder}: the run has just removed this checkpoint; run the command again") from None
        raise _spoilt(folder, damage) from None


def _spoilt(folder: Path, damage: Damaged) -> UserError:
    return UserError(
        f"{folder}: this checkpoint is damaged: {damage}; restore the folder from a backup, or remove the folder to "
        "continue without this checkpoint"
    )


def _load_arrays(folder: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns arrays of a checkpoint by name. `arrays` holds a template from `abstract` for each array."""
    step = np.zeros((), np.asarray(0).dtype)
    try:
        return ocp.load(folder, {"arrays": arrays, "step": step})["arrays"]
    except Exception as raised:  # orbax wraps disk errors in exceptions of many types
        raise UserError(
            f"{folder}: the checkpoint is undamaged but cannot be read: {reason(raised)}; use the versions of jax "
            "and orbax-checkpoint that wrote this checkpoint"
        ) from raised

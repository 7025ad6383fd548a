"""The cache folder for compiled programs; later runs load the same programs from it.

jax writes and reads the folder (https://docs.jax.dev/en/latest/persistent_compilation_cache.html). The key of an entry
is made from program, compiler, flags and processor. If the folder is full, jax removes the entries that were unused for
longest. This file chooses the folder and its size limit. Without a usable folder the run compiles everything.

A user who can write to the folder can make its readers run any code, so only the owner gets access when it is created.
"""

import contextlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrlhf.checkpoint.files import reason
from jaxrlhf.distributed import processes

AUTO = "auto"
LIMIT = 4 * 2**30  # largest size of the folder, in bytes
# Programs of every size are kept: a run has about a hundred small programs, besides its large ones.
_KEEP_ALL = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_DIRECTORY, _MAX = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
_ENABLED = "jax_enable_compilation_cache"


@contextlib.contextmanager
def cached_programs(setting: str | None, say: Callable[[str], None]) -> Iterator[str | None]:
    """In its block, loads compiled programs from a folder and saves new ones there; yields the folder, or None.

    `setting` is a folder, None for no cache, or `AUTO`. `AUTO` means the folder of jax's own setting
    (JAX_COMPILATION_CACHE_DIR), else a folder in the user's cache (XDG_CACHE_HOME, else ~/.cache). An unusable folder
    is reported with `say`. `setting` None also disables the cache for `cached_programs` inside the block.

    All processes of a run call this function. They use the folder only if all of them see it: if one process loaded a
    program that the others compile, the others would wait for it in the shared compilation. Process 0 writes. On CPUs
    only process 0 loads programs, because jax's keys there differ between processes.
    """
    folder, settings = None, {_ENABLED: False}
    own = getattr(jax.config, _DIRECTORY) if setting == AUTO else None  # then jax's own size limit applies too
    if setting is not None and getattr(jax.config, _ENABLED):
        folder = own if own and "://" in own else _prepare(own or setting, say, tidy=not own)  # jax reads URLs itself
    if folder is not None:
        limits = _KEEP_ALL if own else _KEEP_ALL | {_MAX: LIMIT}
        settings = {name: value for name, value in limits.items() if name.upper() not in os.environ}
        settings[_DIRECTORY] = folder
    # An unreadable file or a full disk only costs compile time, so its warning is hidden.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield folder
    finally:
        _configure(before)


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax reads its settings only once, when it first compiles


def _prepare(setting: str, say: Callable[[str], None], tidy: bool) -> str | None:
    """Creates the folder and returns its path; None on all processes if one of them cannot use it.

    With `tidy`, incomplete entries are removed.
    """
    marker, why, folder = processes.from_first(lambda: f".seen-{uuid.uuid4().hex}".encode()).decode(), "", None
    try:
        folder = _user_folder() if setting == AUTO else Path(setting).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if processes.is_first():
            (folder / marker).touch()
            if tidy:
                _remove_incomplete(folder)
    except (OSError, RuntimeError, filelock.Timeout) as error:
        why = reason(error)
    processes.barrier()
    unusable = processes.largest(int(bool(why) or not (folder / marker).exists()))
    if processes.is_first() and folder is not None:
        with contextlib.suppress(OSError):
            (folder / marker).unlink()
    if not unusable:
        return str(folder)
    place = setting if setting != AUTO else "the user's cache folder"
    why = why or "not all processes see the folder of process 0; give a folder that all hosts share"
    say(f"compiled programs are not kept: {place}: {why}; to use another folder, set compilation_cache=FOLDER")
    return None


def _user_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "jaxrlhf" / "xla"


def _remove_incomplete(folder: Path) -> None:
    """Removes incomplete entries, which jax would never rewrite: those without the time of last use, written last."""
    with filelock.FileLock(folder / ".lockfile", timeout=10):  # jax's own lock
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()

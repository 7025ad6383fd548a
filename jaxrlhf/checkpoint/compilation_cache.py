"""The folder of compiled programs, from which the next run of the same programs loads them.

jax writes and reads it (https://docs.jax.dev/en/latest/persistent_compilation_cache.html), under keys of program,
compiler, flags and processor, and removes the entries unused for longest. This file chooses the folder and its size
limit. Without a usable folder the run compiles everything.

Whoever can write to the folder can run code as those who read it, so it is created for its owner alone.
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
LIMIT = 4 * 2**30  # bytes of a folder
# No program is too small: a run has a hundred small ones beside its large ones.
_KEEP_ALL = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_DIRECTORY, _MAX = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
_ENABLED = "jax_enable_compilation_cache"


@contextlib.contextmanager
def cached_programs(setting: str | None, say: Callable[[str], None]) -> Iterator[str | None]:
    """Loads compiled programs from a folder and keeps new ones there; yields the folder, or None without one.

    `setting` is a folder, None for none, or `AUTO`: that of jax's own setting (JAX_COMPILATION_CACHE_DIR), else
    a folder in the user's cache (XDG_CACHE_HOME, else ~/.cache). An unusable folder is reported with `say`. None also
    disables the cache in blocks inside this one. All processes of a run call it. They use a folder that all of them
    see, or none: a process that loads what others compile would leave them waiting in a shared compilation. Process 0
    writes. On CPUs it alone loads programs, since jax has different keys for each process there.
    """
    folder, settings = None, {_ENABLED: False}
    own = getattr(jax.config, _DIRECTORY) if setting == AUTO else None  # the user's own limit applies too
    if setting is not None and getattr(jax.config, _ENABLED):
        folder = own if own and "://" in own else _prepare(own or setting, say, tidy=not own)  # jax reads URLs itself
    if folder is not None:
        limits = _KEEP_ALL if own else _KEEP_ALL | {_MAX: LIMIT}
        settings = {name: value for name, value in limits.items() if name.upper() not in os.environ}
        settings[_DIRECTORY] = folder
    # An unreadable file or a full disk costs compile time only.
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
    """Creates the folder, and with `tidy` removes incomplete entries; None on all processes where one cannot use it."""
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
    why = why or "not all processes see the folder of process 0; give one that all hosts share"
    say(f"compiled programs are not kept: {place}: {why}; for another folder: compilation_cache=FOLDER")
    return None


def _user_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "jaxrlhf" / "xla"


def _remove_incomplete(folder: Path) -> None:
    """Removes entries without the time of last use, which jax writes last; jax would never rewrite them."""
    with filelock.FileLock(folder / ".lockfile", timeout=10):  # jax's own lock
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()

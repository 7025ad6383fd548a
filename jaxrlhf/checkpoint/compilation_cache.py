"""The cache folder for compiled programs. Later runs load the same programs from this folder.

jax writes and reads the folder (https://docs.jax.dev/en/latest/persistent_compilation_cache.html). The key of an entry
depends on program, compiler, flags and processor. If the folder is full, jax removes the entries that were unused for
the longest time. This file chooses the folder and its size limit. Without a usable folder, a run compiles everything.

A user who can write to the folder can make other users run any code. So a new folder is accessible only to its owner.
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
# Programs of every size are saved, because a run has about a hundred small programs besides its large programs.
_KEEP_ALL = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_DIRECTORY, _MAX = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
_ENABLED = "jax_enable_compilation_cache"


@contextlib.contextmanager
def cached_programs(setting: str | None, say: Callable[[str], None]) -> Iterator[str | None]:
    """Uses a cache folder inside the block, and yields the path of this folder, or None if there is no cache.

    Compiled programs are loaded from the folder, and new programs are saved in the folder. `setting` is a folder, None
    for no cache, or `AUTO`. `AUTO` means the folder of jax's setting JAX_COMPILATION_CACHE_DIR. Without this setting,
    `AUTO` means a folder in the user's cache (XDG_CACHE_HOME, else ~/.cache). A folder that cannot be used is reported
    with `say`. If `setting` is None, calls of this function inside the block use no cache either.

    All processes of a run call this function. They use the folder only if all of them see the same folder. Otherwise
    one process could load a program while the others compile it together, and the others would wait forever. Only
    process 0 writes. On CPUs each process compiles for itself, and jax's keys differ between processes, so only process
    0 finds programs in the folder.
    """
    folder, settings = None, {_ENABLED: False}
    own = getattr(jax.config, _DIRECTORY) if setting == AUTO else None  # for this folder, jax's size limit also applies
    if setting is not None and getattr(jax.config, _ENABLED):
        folder = own if own and "://" in own else _prepare(own or setting, say, tidy=not own)  # jax reads URLs itself
    if folder is not None:
        limits = _KEEP_ALL if own else _KEEP_ALL | {_MAX: LIMIT}
        settings = {name: value for name, value in limits.items() if name.upper() not in os.environ}
        settings[_DIRECTORY] = folder
    # A warning about an unreadable file or a full disk is hidden, because the run then only compiles more.
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
    compilation_cache.reset_cache()  # jax reads the settings only at its first compilation after this call


def _prepare(setting: str, say: Callable[[str], None], tidy: bool) -> str | None:
    """Creates the folder and returns its path. If one process cannot use the folder, all processes return None.

    If `tidy` is set, incomplete entries are removed.
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
    say(f"compiled programs are not saved in {place}: {why}; to use another folder, set compilation_cache=FOLDER")
    return None


def _user_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "jaxrlhf" / "xla"


def _remove_incomplete(folder: Path) -> None:
    """Removes incomplete entries. Without this, jax would never complete them, because it writes no entry twice.

    An entry has two files. jax first writes the program, then the time of last use. An incomplete entry lacks the
    second file.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=10):  # jax's own lock
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()

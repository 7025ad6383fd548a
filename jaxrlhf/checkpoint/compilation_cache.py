"""Compiled programs that outlast their process: the next start of the same programs loads them from a folder.

jax keeps them (its persistent compilation cache, https://docs.jax.dev/en/latest/persistent_compilation_cache.html),
each under a key of program, compiler, flags and kind of processor, and removes those that were not used for longest.
Here stands in which folder, for how many bytes, and what happens when there is none: the run goes on, and compiles.

Whoever may write into the folder can have code run by those who read from it: it is made for its owner alone.
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
_REMOTE = "://"  # in what is no path here, but a place that jax reaches by itself
# All programs are worth a file: a run has a hundred small ones beside its large ones.
_KEEP_ALL = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_DIRECTORY, _MAX = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
_ENABLED = "jax_enable_compilation_cache"

Say = Callable[[str], None]


@contextlib.contextmanager
def kept_programs(setting: str | None, say: Say) -> Iterator[str | None]:
    """In the block programs are loaded from a folder, and kept there; gives it, None where there is none.

    `setting` is a folder, None for no folder, or `AUTO`: that of jax's own setting (JAX_COMPILATION_CACHE_DIR), else
    one in the user's cache folder (XDG_CACHE_HOME, else ~/.cache). A folder that cannot be used is said in one line.
    Without a folder programs are compiled anew, also in blocks inside this one.
    On several processes all call it; they keep programs in a folder that all see, or nowhere: one that loads what
    others compile would leave them waiting where compiling is shared. The first one writes. On CPUs it alone finds
    anything: jax has keys of its own for each process there.
    """
    folder, settings = None, {_ENABLED: False}
    own = getattr(jax.config, _DIRECTORY) if setting == AUTO else None  # whose limit is jax's own setting too
    if setting is not None and getattr(jax.config, _ENABLED):
        folder = own if own and _REMOTE in own else _prepared(own or setting, say, tidy=not own)
    if folder is not None:
        wanted = _KEEP_ALL if own else _KEEP_ALL | {_MAX: LIMIT}
        settings = {name: value for name, value in wanted.items() if name.upper() not in os.environ}
        settings[_DIRECTORY] = folder
    # A file that cannot be read, or a disk that is full, costs a compilation in each start: nothing computed changes.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    with _configured(settings):
        yield folder


@contextlib.contextmanager
def _configured(settings: dict[str, object]) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks at its settings once, when it first compiles
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _prepared(setting: str, say: Say, tidy: bool) -> str | None:
    """The folder, made and rid of what a kill cut off; None, on all processes, where one of them cannot use it."""
    mark, why, folder = processes.from_first(lambda: f".seen-{uuid.uuid4().hex}".encode()).decode(), "", None
    try:
        folder = _user_folder() if setting == AUTO else Path(setting).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if processes.is_first():
            (folder / mark).touch()
            if tidy:
                _remove_cut_off(folder)
    except (OSError, RuntimeError, filelock.Timeout) as error:
        why = reason(error)
    processes.barrier()
    missed = processes.largest(int(bool(why) or not (folder / mark).exists()))
    if processes.is_first() and folder is not None:
        with contextlib.suppress(OSError):
            (folder / mark).unlink()
    if missed:
        place = setting if setting != AUTO else "the user's cache folder"
        why = why or "not all processes see it as process 0 does; give one folder of all hosts"
        say(f"compiled programs are not kept: {place}: {why}; another place: compilation_cache=FOLDER")
    return None if missed else str(folder)


def _user_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "jaxrlhf" / "xla"


def _remove_cut_off(folder: Path) -> None:
    """Removes entries without a time of use: jax writes that last, under this lock, and would not write them again."""
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()

"""Compiled programs that outlast their process: the next start of the same programs loads them from a folder.

jax keeps them (its persistent compilation cache, https://docs.jax.dev/en/latest/persistent_compilation_cache.html).
Here stands in which folder, for how many bytes, and what happens when there is none: the run goes on, and compiles.

Whoever may write into the folder can have code run by those who read from it: it is made for its owner alone.
"""

import contextlib
import hashlib
import os
import platform
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrlhf.distributed import processes
from jaxrlhf.distributed.agreement import largest
from jaxrlhf.runtime.run_dir import reason

AUTO = "auto"
LIMIT = 4 * 2**30  # bytes of a folder; those programs that nobody has used for longest go first
_ENTRIES = "*-cache"
_REMOTE = "://"  # in what is no path here, but a place that jax reaches by itself
# All programs are worth a file: a run has a hundred small ones beside its large ones.
_KEEP_ALL = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_DIRECTORY, _ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"

Say = Callable[[str], None]


@contextlib.contextmanager
def kept_programs(setting: str | None, say: Say) -> Iterator[str | None]:
    """In the block programs are loaded from a folder, and kept there; gives it, None where there is none.

    `setting` is a folder, None for no folder, or `AUTO`: that of jax's own setting (JAX_COMPILATION_CACHE_DIR), else
    one in the user's cache folder (XDG_CACHE_HOME, else ~/.cache). A folder that cannot be used is said in one line.
    On several processes all call it; they keep programs in a folder that all see, or nowhere: one that loads what
    others compile would leave them waiting where compiling is shared. The first one writes. On CPUs it alone finds
    anything: jax has keys of its own for each process there.
    """
    folder = None
    if setting is not None and getattr(jax.config, _ENABLED):
        folder = _prepared(setting, say)
        folder = folder if processes.alone() else _common(folder, say)
    given = {name: value for name, value in _KEEP_ALL.items() if name.upper() not in os.environ}
    settings = {_ENABLED: False} if folder is None else {_DIRECTORY: folder, **given}
    # A file that cannot be read, or a disk that is full, costs a compilation in each start: nothing computed changes.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    with _configured(settings):
        yield folder


def compiled_anew() -> contextlib.AbstractContextManager[None]:
    """In the block nothing is loaded or kept: what the compiler says and does is wanted, and not only its result."""
    return _configured({_ENABLED: False})


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


def _prepared(setting: str, say: Say) -> str | None:
    """The folder, made and tidied where it is ours; None where it cannot be used."""
    own = getattr(jax.config, _DIRECTORY) if setting == AUTO else None
    if own and _REMOTE in own:
        return own
    try:
        # What belongs to jax's own setting lies as jax lays it. Ours is one folder for each kind of machine: home
        # folders are shared by machines that differ, and code for the one may not run on the other.
        folder = Path(own).expanduser() if own else _root(setting) / _machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if processes.is_first():
            _probe(folder)
            if not own:
                _tidy(folder)
    except (OSError, RuntimeError) as error:
        place = setting if setting != AUTO else own or "the user's cache folder"
        say(f"compiled programs are not kept: {place}: {reason(error)}; another place: compilation_cache=FOLDER")
        return None
    return str(folder)


def _root(setting: str) -> Path:
    if setting != AUTO:
        return Path(setting).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "jaxrlhf" / "xla"


def _machine() -> str:
    """A name for this kind of processor: equal where the same machine code runs."""
    told = [platform.machine(), platform.system(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
        first = file.read().partition("\n\n")[0].splitlines()
        told += sorted(line for line in first if line.partition(":")[0].strip() in wanted)
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(told).encode()).hexdigest()[:12]}"


def _probe(folder: Path) -> None:
    """`OSError` where nothing can be written."""
    file = folder / f".probe-{uuid.uuid4().hex}"
    file.touch()
    file.unlink()


def _tidy(folder: Path) -> None:
    """Removes what a kill cut off, and what is beyond `LIMIT`. Harmless where other runs are at work in the folder."""
    began, stamp = time.time(), folder / ".tidied"
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    found = []
    for file in folder.glob(_ENTRIES):
        with contextlib.suppress(OSError):
            size = file.stat()
            # Each is looked at once, at the next start.
            if size.st_mtime >= since and not _whole(file.read_bytes()):
                file.unlink()
            else:
                found.append((max(size.st_atime, size.st_mtime), size.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= LIMIT:
            break
        with contextlib.suppress(OSError):
            file.unlink()
            total -= size
    stamp.touch()
    os.utime(stamp, (began, began))


def _whole(data: bytes) -> bool:
    """Whether an entry ends where its compression says that it ends."""
    if data[:4] == b"\x28\xb5\x2f\xfd":  # zstandard, which jax takes where it is installed
        return _whole_zstandard(data)
    stream = zlib.decompressobj()
    try:
        stream.decompress(data)
    except zlib.error:
        return False
    return stream.eof


def _whole_zstandard(data: bytes) -> bool:
    try:
        import zstandard
    except ImportError:
        return True  # jax cannot read it here either, and says so to nobody
    stream = zstandard.ZstdDecompressor().decompressobj()
    try:
        stream.decompress(data)
    except zstandard.ZstdError:
        return False
    return stream.eof


def _common(folder: str | None, say: Say) -> str | None:
    """The folder where all processes see process 0's under the same name; else None, on all."""
    mark = f".seen-{uuid.uuid4().hex}"

    def named() -> bytes:
        if folder is not None and _REMOTE not in folder:
            with contextlib.suppress(OSError):
                Path(folder, mark).touch()
        return f"{folder or ''}/{mark}".encode()

    told = processes.from_first(named).decode()
    theirs = told.rpartition("/")[0]
    seen = theirs == (folder or "") and (not theirs or _REMOTE in theirs or os.path.exists(told))
    missed = largest(0 if seen else 1)
    if processes.is_first():
        with contextlib.suppress(OSError):
            Path(told).unlink()
    if missed and folder is not None:
        say(f"compiled programs are not kept: not all processes see {folder} as process 0 does; give one folder of all "
            "hosts: compilation_cache=FOLDER")  # fmt: skip
    return None if missed else folder

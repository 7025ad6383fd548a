"""Empties the run directory of a run that fails before its first step, so that corrected settings can use it."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxrlhf.checkpoint.checkpoints import stored_steps
from jaxrlhf.checkpoint.run_dir import LOGS, START
from jaxrlhf.distributed.stopping import Stopped
from jaxrlhf.stages.fingerprints import FILE as FINGERPRINTS
from jaxrlhf.tracking.trackers import CLIENTS
from jaxrlhf.tracking.trackers.process import FILES as TRACKERS

_FILES = ("config.yaml", START, FINGERPRINTS, *LOGS, *TRACKERS, "lock")
_FOLDERS = ("checkpoints", "roles", *CLIENTS)


@contextlib.contextmanager
def given_back(folder: Path, made: Sequence[Path], writes: bool) -> Iterator[None]:
    """Removes what a new run has written to `folder` if the `with` block raises before a step is done.

    The caller enters the block while it holds the lock and before it writes the run's first file. Files that the run
    did not write are kept. After a signal all files are kept. `made` are the folders that the run created, inner
    folders first. Each is removed if it is then empty. `writes` is true on the one process that writes files.
    """
    before = {name for name in (*_FILES, *_FOLDERS) if (folder / name).exists()} - {"lock"}
    try:
        yield
    except Exception as error:
        if writes and not isinstance(error, Stopped) and not _has_trained(folder):
            with contextlib.suppress(OSError):  # an error of the removal must not hide the error of the run
                _remove(folder, made, before)
        raise


def _has_trained(folder: Path) -> bool:
    """Whether a step was logged or saved, or a role was saved. The base that the run began with does not count."""
    logged = (folder / LOGS[0]).is_file() and (folder / LOGS[0]).stat().st_size > 0
    roles = {path.name for path in (folder / "roles").iterdir()} if (folder / "roles").is_dir() else set()
    saved = any(stored_steps(path) for path in (folder / "checkpoints").glob("*"))
    return logged or saved or bool(roles - {"base"})


def _remove(folder: Path, made: Sequence[Path], before: set[str]) -> None:
    for name in _FOLDERS:
        if name not in before:
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in _FILES:  # config.yaml is the first: without it, files that a kill leaves are not a run
        if name not in before:
            (folder / name).unlink(missing_ok=True)
    for path in made:
        path.rmdir()  # fails if the folder is not empty, because somebody has put a file there

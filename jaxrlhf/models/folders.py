"""Folders of models and adapters: where they are found, and how they are written, complete or not at all."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxrlhf.errors import UserError
from jaxrlhf.runtime.run_dir import atomic_directory

DTYPES = ("float32", "bfloat16", "float16")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]


def check_dtype(dtype: str | None) -> None:
    """`UserError` unless it is None or the name of a dtype that weights may have."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, not {dtype!r}")


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the local copy of a hub id's files."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)):
        raise UserError(f"{path}: no such folder; want one with config.json and weights, or a hub id like owner/name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # hub and connection errors are OSErrors, a malformed id a ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: no such folder here, and not to be had from the hub: {reason}") from None


@contextlib.contextmanager
def written_once(target: Path) -> Iterator[tuple[Path, bool]]:
    """A folder to write into and whether this process is the one that writes; the others wait for it."""
    primary = jax.process_index() == 0
    with atomic_directory(target, replace=True) if primary else contextlib.nullcontext(target) as folder:
        yield folder, primary
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"written {target.name}")


def check_replaceable(target: Path, mark: str, expected: Callable[[Path], bool]) -> None:
    """`UserError` where a folder is there that holds anything but an older version of what is to be written."""
    if target.is_dir():
        files = list(target.iterdir())
        strangers = sorted(file.name for file in files if not expected(file))
        if strangers or (files and mark not in {file.name for file in files}):
            what = strangers[0] if strangers else files[0].name
            raise UserError(f"{target}: holds {what}, which would be lost; give a new or empty folder")

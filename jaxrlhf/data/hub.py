"""Downloads files from the Hugging Face hub. The log lines of the libraries are not shown."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.tracking.notices import notice

# Logger -> the environment variable with which the user sets the level of this logger.
LOGS = {"huggingface_hub": "HF_HUB_VERBOSITY", "datasets": "DATASETS_VERBOSITY"}
PROBE = 10  # seconds; if the hub does not answer within this time, the copy in the cache is used


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the libraries' warnings inside the block. If the user has set the level of a logger, it is not changed."""
    loggers = [logging.getLogger(name) for name, variable in LOGS.items() if variable not in os.environ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def download(name: str, files: list[str]) -> Path:
    """Returns the folder of the local copy of a model's files. Raises `OSError` or `ValueError` if there is no copy."""
    import huggingface_hub

    with quiet():
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))


def download_file(name: str, file: str) -> Path:
    """Returns the path of the local copy of one model file. Raises `OSError` or `ValueError` if there is no copy."""
    import huggingface_hub

    with quiet():
        return Path(huggingface_hub.hf_hub_download(name, file))


def load_dataset(name: str, subset: str | None, split: str, streaming: bool = False) -> Any:
    """Returns a data set of the hub. If the hub cannot be reached, the copy in the cache is returned.

    One request decides whether the hub can be reached, because `datasets` would try again for half a minute. Errors of
    `datasets` are raised unchanged.
    """
    import datasets

    with quiet(), contextlib.ExitStack() as stack:
        reached = _reached(name)
        if not reached:
            stack.enter_context(_offline())
        table = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    if not reached:
        notice(f"{name}: the hub cannot be reached; the copy of the data set in the cache is used")
    return table


def _reached(name: str) -> bool:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=PROBE)
    except HfHubHTTPError:  # the hub answered, for example that there is no such data set
        return True
    except Exception:  # an error of one of several HTTP libraries, or of offline mode
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before

"""Files from the Hugging Face hub, without the libraries' logs: what fails is one line of ours."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.tracking.notices import notice

LOGS = {"huggingface_hub": "HF_HUB_VERBOSITY", "datasets": "DATASETS_VERBOSITY"}  # the user's own setting of each
PROBE = 10  # seconds for the hub to answer, before the copy in the cache is used


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the libraries' warnings inside the block, except those that the user has asked for."""
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
    """The local copy of a model's files. Raises `OSError` or `ValueError` where it cannot be had."""
    import huggingface_hub

    with quiet():
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))


def download_file(name: str, file: str) -> Path:
    """The local copy of one file of a model. Raises `OSError` or `ValueError` where it cannot be had."""
    import huggingface_hub

    with quiet():
        return Path(huggingface_hub.hf_hub_download(name, file))


def load_dataset(name: str, subset: str | None, split: str) -> Any:
    """A data set of the hub, or its copy in the cache where the hub cannot be reached; raises what `datasets` raises.

    `datasets` would try an unreachable hub again for half a minute. Here one request decides.
    """
    import datasets

    with quiet(), contextlib.ExitStack() as stack:
        reached = _reached(name)
        if not reached:
            stack.enter_context(_offline())
        table = datasets.load_dataset(name, subset, split=split)
    if not reached:
        notice(f"{name}: the hub cannot be reached; its copy in the cache is used")
    return table


def _reached(name: str) -> bool:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=PROBE)
    except HfHubHTTPError:  # an answer, such as that there is no such data set
        return True
    except Exception:  # the errors of several HTTP libraries, or offline mode
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

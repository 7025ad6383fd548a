"""Files of `PPO`: a zip with model.json and arrays.safetensors. A file contains no code, so reading it runs none."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jaxrlhf.checkpoint.files import atomic_write, reason
from jaxrlhf.checkpoint.leaves import named_leaves
from jaxrlhf.errors import Fault, UserError

_JSON, _ARRAYS = "model.json", "arrays.safetensors"
VERSION = 1


def with_suffix(path: str | os.PathLike) -> Path:
    """Returns the path with .zip, as Stable-Baselines3 names its files, unless the path ends with .zip."""
    path = Path(path)
    return path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")


def write_model(path: str | os.PathLike, about: dict[str, Any], tree: Any) -> Path:
    """Writes JSON and the arrays of a tree. The file appears complete or not at all.

    Raises `Fault` if writing fails.
    """
    path = with_suffix(path)
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(tree).items()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in (
            (_JSON, json.dumps({"version": VERSION, **about}, indent=1)),
            (_ARRAYS, safetensors.numpy.save(arrays)),
        ):
            archive.writestr(zipfile.ZipInfo(name), data)  # no date: equal models are equal files
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content.getvalue())
    except OSError as error:
        raise Fault(f"{path}: the model cannot be written: {reason(error)}") from error
    return path


def read_model(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the JSON and the arrays by name. Raises `UserError` if this is not a file of `PPO.save`."""
    path = Path(path) if Path(path).is_file() else with_suffix(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a path that PPO.save wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read(_JSON))
            arrays = safetensors.numpy.load(archive.read(_ARRAYS))
    except (zipfile.BadZipFile, KeyError, ValueError, safetensors.SafetensorError) as error:
        hint = "; files of Stable-Baselines3 hold pickled code and are not read" if _is_theirs(path) else ""
        raise UserError(f"{path}: this is not a file that PPO.save wrote: {error}{hint}") from None
    if about.get("version") != VERSION:
        raise UserError(f"{path}: the version of the file must be {VERSION}, not {about.get('version')!r}")
    return about, arrays


def filled(template: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """Returns the template's tree with the arrays of the file.

    Raises `UserError` if an array is missing or has another shape or dtype than in the template.
    """
    needed = named_leaves(template)
    leaves = []
    for name, leaf in needed.items():
        found = arrays.get(name)
        if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
            form = "is missing" if found is None else f"has shape {list(found.shape)} and dtype {found.dtype}"
            needs = f"shape {list(leaf.shape)} and dtype {leaf.dtype}"
            raise UserError(f"{path}: array {name} {form}; it must have {needs}")
        leaves.append(found)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _is_theirs(path: Path) -> bool:
    return zipfile.is_zipfile(path) and "policy.pth" in zipfile.ZipFile(path).namelist()

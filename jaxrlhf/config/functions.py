"""Imports the functions that settings name as `module:function` or `path.py:function`. Does not import jax."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from jaxrlhf.errors import UserError, one_line


def load_function(spec: str, key_path: str) -> Callable:
    """Imports the function `spec`, which is `module:function` or `path.py:function`.

    Raises UserError if the import fails. `key_path` is the setting that names the function. The message contains it.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise UserError(f"{key_path}: {spec!r} is neither module:function nor path.py:function")
    try:
        module = _load_file(where, key_path) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{key_path}: cannot import {where}: {what}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [(n, v) for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        known = [n for n, _ in own if not n.startswith("_")]
        raise UserError(f"{key_path}: {where} has no function {name}; its functions are: {', '.join(known) or 'none'}")
    return function


def _load_file(path: str, key_path: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"{key_path}: there is no file {path} (the current directory is {os.getcwd()})")
    # The file may import other files of its folder, now or in a later call. The folder is last in sys.path, so
    # that its files hide no installed module.
    if (folder := str(Path(path).parent.absolute())) not in sys.path:
        sys.path.append(folder)
    # Without the prefix, a file json.py would hide the module json. Dataclasses look up their module in sys.modules.
    name = f"jaxrlhf_file_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

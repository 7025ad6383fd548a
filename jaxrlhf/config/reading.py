"""Reads the settings of a run from a YAML file and from overrides on the command line. Each error is one line.

Scalars follow YAML 1.2. So `1e-4` is a float, `012` is the number twelve, and `no`, `on` and `2024-01-01` are text.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jaxrlhf.config import RunConfig
from jaxrlhf.config.faults import explain
from jaxrlhf.config.paths import not_utf8
from jaxrlhf.config.table import describe, dotted, find_setting, one_line
from jaxrlhf.errors import UserError

KeyPath = tuple[str, ...]
MAX_DEPTH, MAX_VALUES = 50, 100_000  # limits for one file, so that its reading takes limited time
_TOO_DEEP = f"more than {MAX_DEPTH} nested sections and lists; use at most {MAX_DEPTH}"


# ---------------------------------------------------------------- the public functions


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads the settings of a YAML file, applies overrides such as `ppo.kl.coef=0.1`, and validates the result.

    The value of an override is YAML. Missing sections are created. If a setting does not accept `null`, the value
    `null` is an error; but a section of the file may be empty, and then has its defaults. Paths in settings are relative
    to the current directory. Raises `UserError` if the file, an override or a setting cannot be used.
    """
    data, origins = _read(str(path))
    _drop_empty_sections(data, ())
    for override in overrides:
        _override(data, origins, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, str(path), origins)) from None


def dump_config(config: RunConfig) -> str:
    """Returns every setting as YAML. `load_config` reads an equal config from this text."""
    text = io.StringIO()
    _yaml().dump(_plain(config.model_dump(by_alias=True)), text)
    return text.getvalue()


# ---------------------------------------------------------------- YAML


class _Constructor(SafeConstructor):
    """Reads dates as text, because no setting is a date and run_dir=2024-01-01 is a name."""


_Constructor.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda constructor, node: constructor.construct_scalar(node)
)


def _yaml() -> YAML:
    """Returns a reader and writer of YAML 1.2."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 1000, False
    yaml.representer.ignore_aliases = lambda data: True  # equal sections are written in full, not as anchors
    return yaml


def parse_yaml(text: str, where: str, origins: dict[KeyPath, str] | None = None) -> Any:
    """Returns the value of a YAML document. `origins` is filled with the source of every key.

    If the document is not valid, raises `UserError` with the line.
    """
    try:
        yaml = _yaml()
        node = yaml.compose(text)
        if node is None:
            return None
        _Walk(where, {} if origins is None else origins).walk(node, (), ())
        return yaml.constructor.construct_document(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{where}:{mark.line + 1}:{mark.column + 1}: not valid YAML: {one_line(error.problem or error.context)}"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: {_TOO_DEEP}") from None
    except (YAMLError, ValueError, TypeError, AttributeError) as error:  # also raised if a tag does not fit its value
        raise UserError(f"{where}: not valid YAML: {one_line(str(error))}") from None


class _Walk:
    """Records the line of each key. Rejects YAML that must not be in a settings file."""

    def __init__(self, where: str, origins: dict[KeyPath, str]):
        self.where, self.origins, self.seen = where, origins, 0

    def walk(self, node: Node, path: KeyPath, above: tuple[int, ...]) -> None:
        line = f"{self.where}:{node.start_mark.line + 1}"
        self.seen += 1
        if id(node) in above:
            raise UserError(f"{line}: {dotted(path)} contains itself; remove its alias")
        if len(above) > MAX_DEPTH:
            raise UserError(f"{line}: {_TOO_DEEP}")
        if self.seen > MAX_VALUES:  # a few nested aliases may expand to billions of values
            raise UserError(
                f"{line}: more than {MAX_VALUES:,} values after the expansion of aliases; use at most {MAX_VALUES:,}"
            )
        if isinstance(node, ScalarNode):
            self._scalar(node, line, path)
        if isinstance(node, SequenceNode):
            for number, child in enumerate(node.value):
                entry = (*path, f"[{number}]")
                self.origins.setdefault(entry, f"{self.where}:{child.start_mark.line + 1}")
                self.walk(child, entry, (*above, id(node)))
        if isinstance(node, MappingNode):
            self._mapping(node, path, (*above, id(node)))

    def _scalar(self, node: ScalarNode, line: str, path: KeyPath) -> None:
        try:
            node.value.encode()
        except UnicodeEncodeError:  # config.yaml of a run cannot hold this text
            raise UserError(f"{line}: {dotted(path)}: {not_utf8(node.value)}: {node.value[:40]!r}") from None

    def _mapping(self, node: MappingNode, path: KeyPath, above: tuple[int, ...]) -> None:
        lines: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                if not isinstance(key, ScalarNode):
                    raise UserError(
                        f"{self.where}:{line}: a key must be the name of a setting; put a text that begins with {{ or [ "
                        "in quotes"
                    )
                text = one_line(str(key.value))
                raise UserError(f"{self.where}:{line}: a key must be the name of a setting, not {text}")
            if key.value in lines:
                raise UserError(
                    f"{self.where}:{line}: {dotted((*path, key.value))} is given twice, first in line "
                    f"{lines[key.value]}; remove one of them"
                )
            lines[key.value] = line
            self.origins.setdefault((*path, key.value), f"{self.where}:{line}")
            self.walk(child, (*path, key.value), above)


def _read(path: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Returns the settings of a file, and the source "FILE:LINE" of each key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a directory; give the YAML file in this directory") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from None
    origins: dict[KeyPath, str] = {}
    data = parse_yaml(text, path, origins)
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path}: the file must hold settings as `key: value`, not {describe(data)}")
    return _plain(data or {}), origins  # in this copy, sections that share an anchor are separate


def _override(data: dict[str, Any], origins: dict[KeyPath, str], text: str) -> None:
    """Applies one override `key.path=value` to `data`, which is changed in place."""
    where = f"override '{one_line(text)}'"
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {not_utf8(text)}") from None
    keys, equals, value = text.partition("=")
    path = tuple(keys.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"{where}: must have the form key.path=value, such as ppo.kl.coef=0.1")
    parsed = parse_yaml(value, where)
    if parsed is None and value.strip().lower() not in ("null", "~"):  # nothing, or a comment
        raise UserError(f"{where}: the value is missing; give key.path=value, such as ppo.kl.coef=0.1")
    section = data
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
            origins[path[:depth]] = where
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"{where}: {'.'.join(path[:depth])} must be a section with keys, not {describe(section)}")
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    section[path[-1]] = parsed
    origins[path] = where


def _drop_empty_sections(data: dict[str, Any], path: KeyPath) -> None:
    """Removes sections without keys from `data`, in place. These sections then have their defaults.

    A null is kept if null is a valid value of the section.
    """
    for name, value in list(data.items()):
        setting = find_setting((*path, name))
        if value is None and setting is not None and setting.is_section and not setting.kind.endswith("or null"):
            del data[name]
        elif isinstance(value, dict):
            _drop_empty_sections(value, (*path, name))


def _plain(value: Any) -> Any:
    """Returns a deep copy of the value with lists instead of tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

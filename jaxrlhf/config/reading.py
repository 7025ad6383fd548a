"""Reads a run's settings: a YAML file, overrides from the command line, and one line for whatever is wrong.

Scalars are read by the rules of YAML 1.2: `1e-4` is a float, `no`, `on` and `2024-01-01` are text, `012` is
twelve.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from jaxrlhf.config import RunConfig
from jaxrlhf.config.faults import explain
from jaxrlhf.config.table import described, find_setting, one_line
from jaxrlhf.errors import UserError

KeyPath = tuple[str, ...]
DEPTH, VALUES = 50, 100_000  # bounds on what a file may cost
_TOO_DEEP = f"sections and lists in one another deeper than {DEPTH}; settings need fewer"


# ---------------------------------------------------------------- the public functions


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a YAML file, changed by overrides such as `ppo.kl.coef=0.1`, checked.

    An override's value is YAML; it makes sections that are not there. `null`, in an override or in the file, is a
    setting's value where it takes null, and else resets it to its default. Paths among the settings stay as they are
    written: relative to the current directory. Raises `UserError` for a file, override or setting that cannot be used.
    """
    data, origins = _read(str(path))
    for override in overrides:
        _override(data, origins, override)
    _drop_nulls(data, ())
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, str(path), origins)) from None


def dump_config(config: RunConfig) -> str:
    """Every setting as YAML that `load_config` reads back to an equal config."""
    text = io.StringIO()
    _yaml().dump(_plain(config.model_dump()), text)
    return text.getvalue()


# ---------------------------------------------------------------- YAML


class _Constructor(SafeConstructor):
    """Dates stay text: no setting is one, and run_dir=2024-01-01 is a name."""


_Constructor.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda constructor, node: constructor.construct_scalar(node)
)


def _yaml() -> YAML:
    """Reader and writer of YAML 1.2."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 1000, False
    yaml.representer.ignore_aliases = lambda data: True  # equal sections are written out rather than as anchors
    return yaml


def parse_yaml(text: str, where: str, origins: dict[KeyPath, str] | None = None) -> Any:
    """The value of one YAML document; `UserError` says where it is wrong. `origins` receives the place of every key."""
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
    except (YAMLError, ValueError, TypeError, AttributeError) as error:  # also a tag that its value does not fit
        raise UserError(f"{where}: not valid YAML: {one_line(str(error))}") from None


class _Walk:
    """Notes the line of each key, and refuses what YAML allows and a settings file must not have."""

    def __init__(self, where: str, origins: dict[KeyPath, str]):
        self.where, self.origins, self.seen = where, origins, 0

    def walk(self, node: Node, path: KeyPath, above: tuple[int, ...]) -> None:
        line = f"{self.where}:{node.start_mark.line + 1}"
        self.seen += 1
        if id(node) in above:
            raise UserError(f"{line}: {'.'.join(path)} contains itself")
        if len(above) > DEPTH:
            raise UserError(f"{line}: {_TOO_DEEP}")
        if self.seen > VALUES:  # a few aliases of aliases make billions
            raise UserError(f"{line}: more than {VALUES:,} values, aliases written out; settings are fewer")
        if isinstance(node, SequenceNode):
            for child in node.value:  # the keys of sections in a list have no key path
                self.walk(child, (*path, "[]"), (*above, id(node)))
        if isinstance(node, MappingNode):
            self._mapping(node, path, (*above, id(node)))

    def _mapping(self, node: MappingNode, path: KeyPath, above: tuple[int, ...]) -> None:
        lines: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                given = one_line(str(key.value))
                raise UserError(f"{self.where}:{line}: a key must be the name of a setting; given {given}")
            if key.value in lines:
                dotted = ".".join((*path, key.value))
                raise UserError(
                    f"{self.where}:{line}: {dotted} is given twice, first in line {lines[key.value]}; keep one"
                )
            lines[key.value] = line
            self.origins.setdefault((*path, key.value), f"{self.where}:{line}")
            self.walk(child, (*path, key.value), above)


def _read(path: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The file's settings, and where each key stands ("file:line")."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.start}); give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    origins: dict[KeyPath, str] = {}
    data = parse_yaml(text, path, origins)
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path}: must hold settings as `key: value`; given {described(data)}")
    return _plain(data or {}), origins  # rebuilt: sections that share an anchor become separate ones


def _override(data: dict[str, Any], origins: dict[KeyPath, str], text: str) -> None:
    """Applies one `key.path=value` to `data`, in place."""
    where = f"override '{one_line(text)}'"
    dotted, equals, value = text.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"{where}: write it as key.path=value, such as ppo.kl.coef=0.1")
    section = data
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
            origins[path[:depth]] = where
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(
                f"{where}: {'.'.join(path[:depth])} is {described(section)}, not a section with keys of its own"
            )
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    section[path[-1]] = parse_yaml(value, where)
    origins[path] = where


def _drop_nulls(data: dict[str, Any], path: KeyPath) -> None:
    """Removes known settings that are null and may not be, in place: there null means the default."""
    for name, value in list(data.items()):
        setting = find_setting((*path, name))
        if value is None and setting is not None and not setting.kind.endswith("or null"):
            del data[name]
        elif isinstance(value, dict):
            _drop_nulls(value, (*path, name))


def _plain(value: Any) -> Any:
    """The same value with lists for tuples, as YAML has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

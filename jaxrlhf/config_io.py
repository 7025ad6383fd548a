"""Reads a run's settings: a YAML file, overrides from the command line, and one line for whatever is wrong.

Scalars are read by the rules of YAML 1.2: `1e-4` is a float, `no`, `on` and `2024-01-01` are text, `012` is
twelve. What each setting is called, takes and defaults to is taken from the models in `config` through their
JSON schema, so the help page and the messages cannot differ from what is checked.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jaxrlhf.config import RunConfig
from jaxrlhf.errors import UserError

KeyPath = tuple[str, ...]
_REQUIRED = object()


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
        raise UserError(_explain(error, str(path), origins)) from None


def dump_config(config: RunConfig) -> str:
    """Every setting as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(_plain(config.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def settings_help() -> str:
    """Every setting, one line each: key path, type and bounds, default, description."""
    lines = []
    for path, setting in _settings().items():
        if setting.is_section:
            default = " = null" if setting.default is None else ""
        elif setting.default is _REQUIRED:
            default = ", required"
        else:
            default = f" = {_show(setting.default)}"
        lines.append(f"{'.'.join(path)}  {setting.kind}{default}  {setting.description}")
    return "\n".join(lines)


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 in place of those of 1.1."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own name; filled below)


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_SCALARS = (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+(_[0-9]+)*", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # write equal sections out rather than as anchors


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(_INT, lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor(
    _FLOAT, lambda loader, node: float(re.sub(r"\.(inf|nan)", r"\1", loader.construct_scalar(node).lower()))
)


def _parse(text: str, where: str, origins: dict[KeyPath, str] | None = None) -> Any:
    """The value of one YAML document. `origins` receives the place of every key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _walk(node, (), where, {} if origins is None else origins, ())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{where}:{mark.line + 1}:{mark.column + 1}: not valid YAML: {_one_line(error.problem or error.context)}"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_one_line(str(error))}") from None
    except (ValueError, TypeError, AttributeError) as error:  # a tag that its value does not fit: !!int x
        raise UserError(f"{where}: not valid YAML: {_one_line(str(error))}") from None


def _walk(node: yaml.Node, path: KeyPath, where: str, origins: dict[KeyPath, str], above: tuple[int, ...]) -> None:
    """Notes the line of each key, and refuses what YAML allows and a settings file must not have."""
    if id(node) in above:
        raise UserError(f"{where}:{node.start_mark.line + 1}: {'.'.join(path)} contains itself")
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _walk(child, path, where, {}, (*above, id(node)))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{where}:{line}: a key must be the name of a setting; given {_one_line(str(key.value))}")
        if key.value in seen:
            raise UserError(
                f"{where}:{line}: {'.'.join((*path, key.value))} is given twice, first in line {seen[key.value]}; "
                "keep one"
            )
        seen[key.value] = line
        origins[(*path, key.value)] = f"{where}:{line}"
        _walk(child, (*path, key.value), where, origins, (*above, id(node)))


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
    data = _parse(text, path, origins)
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path}: must hold settings as `key: value`; given {_describe_value(data)}")
    return _plain(data or {}), origins  # rebuilt: sections that share an anchor become separate ones


def _override(data: dict[str, Any], origins: dict[KeyPath, str], text: str) -> None:
    """Applies one `key.path=value` to `data`, in place."""
    where = f"override '{_one_line(text)}'"
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
                f"{where}: {'.'.join(path[:depth])} is {_describe_value(section)}, not a section with keys of its own"
            )
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    section[path[-1]] = _parse(value, where)
    origins[path] = where


def _drop_nulls(data: dict[str, Any], path: KeyPath) -> None:
    """Removes known settings that are null and may not be, in place: there null means the default."""
    for name, value in list(data.items()):
        setting = _settings().get((*path, name))
        if value is None and setting is not None and not setting.kind.endswith("or null"):
            del data[name]
        elif isinstance(value, dict):
            _drop_nulls(value, (*path, name))


# ---------------------------------------------------------------- what the settings are


@dataclass(frozen=True)
class _Setting:
    kind: str  # type and bounds, as help and messages say them
    default: Any  # _REQUIRED where there is none
    description: str
    is_section: bool


@functools.cache
def _settings() -> dict[KeyPath, _Setting]:
    """Every section and setting by key path, in the order of `config`."""
    schema = RunConfig.model_json_schema()
    found: dict[KeyPath, _Setting] = {}

    def add(section: dict, path: KeyPath, defaults: dict[str, Any]) -> None:
        for name, node in section["properties"].items():
            options = [option for option in node.get("anyOf", [node]) if option.get("type") != "null"]
            default = defaults.get(name, node.get("default", _REQUIRED))
            inner = schema["$defs"][options[0]["$ref"].split("/")[-1]] if "$ref" in options[0] else None
            kind = "section" if inner else _kind(options[0])
            if "anyOf" in node:
                kind += " or null"
            found[*path, name] = _Setting(kind, default, node.get("description", ""), inner is not None)
            if inner:
                add(inner, (*path, name), default if isinstance(default, dict) else {})

    add(schema, (), {})
    return found


def _kind(schema: dict) -> str:
    """Type and bounds of a schema that is no section."""
    if "enum" in schema or "const" in schema:
        return " | ".join(_show(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "object":
        return "mapping of names"
    if schema["type"] == "array":
        items = _kind(schema["items"])
        return f"{'non-empty ' if schema.get('minItems') else ''}list of {items}"
    kind = {"integer": "int", "number": "float", "boolean": "true | false", "string": "text"}[schema["type"]]
    names = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {_show(schema[name])}" for name, sign in names.items() if name in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()


# ---------------------------------------------------------------- messages


def _explain(error: ValidationError, path: str, origins: dict[KeyPath, str]) -> str:
    """One line for the first fault: what, where, what would be right."""
    faults = error.errors(include_url=False)
    # A list with one bad item is also reported as too short: keep the fault that is nearest to the cause.
    faults = [f for f in faults if not any(len(g["loc"]) > len(f["loc"]) == _shared(f, g) for g in faults)]
    faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")  # a misspelt key often explains a missing one
    fault = faults[0]
    keys = tuple(part for part in fault["loc"] if isinstance(part, str))
    message = _describe_fault(fault, keys)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{_place(fault, keys, path, origins)}: {message}{more}"


def _shared(one: dict, other: dict) -> int:
    """How many leading parts the places of two faults have in common."""
    pairs = zip(one["loc"], other["loc"])
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one["loc"]), len(other["loc"])))


def _place(fault: dict, keys: KeyPath, path: str, origins: dict[KeyPath, str]) -> str:
    """File and line, or override, that the fault comes from."""
    if fault["type"] == "value_error":  # about a whole section: an override of a key that it names is the cause
        words = re.findall(r"\w+", fault["msg"])
        for known, where in reversed(origins.items()):
            if known[: len(keys)] == keys and where.startswith("override ") and known[-1] in words:
                return where
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return origins[keys[:length]]
    return path


def _describe_fault(fault: dict, keys: KeyPath) -> str:
    dotted = ".".join(keys)
    setting = _settings().get(keys)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {dotted}; {_nearest(keys)}"
    if fault["type"] == "missing":
        return f"{dotted} is missing; it takes {setting.kind}: {setting.description}"
    if fault["type"] == "value_error" or setting is None:
        reason = _one_line(fault["msg"].removeprefix("Value error, "))
        return f"{dotted}: {reason}" if dotted else reason
    kind = setting.kind.replace("section", "a section with keys of its own")
    hint = ""
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        hint = "; text that looks like a number is written in quotes"
    return f"{dotted} must be {kind}; given {_describe_value(fault['input'])}{hint}"


def _nearest(keys: KeyPath) -> str:
    """The known key that was probably meant, or the list of known ones."""
    *section, name = keys
    known = [path[-1] for path in _settings() if list(path[:-1]) == section]
    close = difflib.get_close_matches(name, known, n=1)
    below = [p for p in _settings() if list(p[: len(section)]) == section]
    joined = {re.sub(r"\W|_", "", "".join(p[len(section) :])): p for p in below}  # "klcoef" is kl.coef
    run_on = joined.get(re.sub(r"\W|_", "", name))
    deeper = [p for p in below if p[-1] == name] or ([run_on] if run_on else [])
    if close:
        return f"the nearest known one is {'.'.join((*section, close[0]))}"
    if deeper:
        return f"there is {' and '.join('.'.join(p) for p in deeper[:3])}"
    return f"known ones {'in ' + '.'.join(section) if section else 'here'}: {', '.join(known)}"


def _describe_value(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"the list {_show(value)}"
    return f"the text {json.dumps(_one_line(value), ensure_ascii=False)}" if isinstance(value, str) else _show(value)


def _show(value: Any) -> str:
    """A value as it would stand in the file, on one line and not too long."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(_show(item) for item in value)}]"
    elif isinstance(value, float):
        text = repr(value) if math.isfinite(value) else f".{value}".replace(".-", "-.")
    elif isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w./:-]*", value) and value.lower() not in ("null", "true", "false")
        text = value if plain else json.dumps(value, ensure_ascii=False)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _plain(value: Any) -> Any:
    """The same value with lists for tuples, as YAML has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

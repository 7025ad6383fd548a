"""The settings as a table: every section and setting with type, bounds, default and description, for help and messages.

A place is a tuple of names as pydantic tells it: in a section that has several kinds the kind is a part of it, spelt
`kind=http`, and what is below a mapping of names (the parts of a sum) stands under `*`.
"""

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config.run import RunConfig

SettingPath = tuple[str, ...]
REQUIRED = object()
ANY = "*"
KINDS = tuple(f"kind={kind}" for kind in ("model", "function", "classifier", "http", "sum"))


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    kind: str  # type and bounds, as help and messages say them
    default: Any  # REQUIRED where there is none
    description: str
    is_section: bool
    notes: dict[str, Any]  # of its field, see `config.base`
    kinds: tuple[str, ...] = ()  # of a section that has several


@functools.cache
def settings() -> dict[SettingPath, Setting]:
    """Every section and setting by its place, in the order of `RunConfig`."""
    schema = RunConfig.model_json_schema()
    found: dict[SettingPath, Setting] = {}

    def definition(node: dict) -> dict:
        return schema["$defs"][node["$ref"].split("/")[-1]]

    def add(section: dict, place: SettingPath, defaults: dict[str, Any]) -> None:
        for name, node in section["properties"].items():
            default = defaults.get(name, node.get("default", REQUIRED))
            enter(node, (*place, name), default)

    def enter(node: dict, place: SettingPath, default: Any) -> None:
        """A row for a setting or section, and for what a section or a mapping of sections holds."""
        (inner,) = (option for option in node.get("anyOf", [node]) if option.get("type") != "null")
        options = {definition(option)["properties"]["kind"]["const"]: option for option in inner.get("oneOf", [])}
        kind = f"section of kind {' | '.join(options)}" if options else "section" if "$ref" in inner else _kind(inner)
        kind += " or null" * ("anyOf" in node)
        is_section = bool(options) or "$ref" in inner
        found[place] = Setting(kind, default, node.get("description", ""), is_section, node, tuple(options))
        if "$ref" in inner:
            add(definition(inner), place, default if isinstance(default, dict) else {})
        for name, option in options.items():
            add(definition(option), (*place, f"kind={name}"), {})
        entries = inner.get("additionalProperties")
        if isinstance(entries, dict) and "oneOf" in entries:
            enter(entries, (*place, ANY), REQUIRED)

    add(schema, (), {})
    return found


@functools.cache
def _paths() -> frozenset[SettingPath]:
    """Every place and all that are above one."""
    return frozenset(place[:depth] for place in settings() for depth in range(len(place) + 1))


def path_of(names: Sequence[str]) -> SettingPath | None:
    """Where names lead that may leave kinds out and give a mapping's own names; the first of several, or None."""
    places: list[SettingPath] = [()]
    for name in names:
        steps = [(kind, step) for kind in (None, *KINDS) for step in (name, ANY)]
        ways = [(*place, *filter(None, step)) for place in places for step in steps]
        places = [way for way in ways if way in _paths()]
    return places[0] if places else None


def find_setting(names: Sequence[str]) -> Setting | None:
    """The setting that names lead to; of an entry of a mapping that is no section, the mapping. None: there is none."""
    for length in range(len(names), 0, -1):
        setting = settings().get(path_of(names[:length]) or ())
        if setting is not None:
            return setting if length == len(names) or setting.kind.startswith("mapping") else None
    return None


def without_kinds(place: Sequence[str]) -> SettingPath:
    """A place as a file has it."""
    return tuple(name for name in place if not name.startswith("kind="))


def settings_help() -> str:
    """Every setting, one line each: key path, type and bounds, default, description."""
    lines = []
    for place, setting in settings().items():
        if ANY in place:  # as where they stand alone
            continue
        if setting.is_section:
            default = " = null" if setting.default is None else ""
        elif setting.default is REQUIRED:
            default = ", required"
        else:
            default = f" = {shown(setting.default)}"
        lines.append(f"{spelt(place)}  {setting.kind}{default}  {setting.description}")
    return "\n".join(lines)


def spelt(place: SettingPath) -> str:
    """A place in one word, such as `ppo.reward[http].url`."""
    return re.sub(r"\.kind=(\w+)", r"[\1]", ".".join(place))


def _kind(schema: dict) -> str:
    """Type and bounds of a schema that is no section."""
    if "enum" in schema or "const" in schema:
        return " | ".join(shown(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "object":
        return "mapping of names"
    if schema["type"] == "array":
        items = _kind(schema["items"])
        return f"{'non-empty ' if schema.get('minItems') else ''}list of {items}"
    kind = {"integer": "int", "number": "float", "boolean": "true | false", "string": "text"}[schema["type"]]
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {shown(schema[name])}" for name, sign in signs.items() if name in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()


def described(value: Any) -> str:
    """A value in the words of a message."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"the list {shown(value)}"
    return f"the text {json.dumps(one_line(value), ensure_ascii=False)}" if isinstance(value, str) else shown(value)


def shown(value: Any) -> str:
    """A value as it would stand in the file, on one line and not too long."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(shown(item) for item in value)}]"
    elif isinstance(value, float):
        text = repr(value) if math.isfinite(value) else f".{value}".replace(".-", "-.")
    elif isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w./:-]*", value) and value.lower() not in ("null", "true", "false")
        text = value if plain else json.dumps(value, ensure_ascii=False)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str) -> str:
    """Text on one line and not too long."""
    text = " ".join(str(text).split())
    return text if len(text) <= 160 else text[:157] + "..."

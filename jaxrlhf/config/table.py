"""A table of all settings with type, bounds, default and description, for help, docs and messages.

The place of a setting is a tuple of names, as in pydantic's errors. If a section has several kinds, the place also
contains the kind, such as `kind=http`. In a place, `*` means any name of a mapping (the parts of a sum), and `[]` means
any entry of a list of sections (alarms).
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config.base import LARGEST, LARGEST_FLOAT
from jaxrlhf.config.data import MIX_WITH
from jaxrlhf.config.run import RunConfig

SettingPath = tuple[str, ...]
REQUIRED = object()
ANY, ENTRY = "*", "[]"
_KINDS = ("model", "function", "classifier", "http", "code_tests", "judge", "sum")
KINDS = tuple(f"kind={kind}" for kind in _KINDS)


@dataclass(frozen=True)
class Setting:
    """A row of the table: one setting or section."""

    kind: str  # type and bounds, as text
    default: Any  # or REQUIRED
    description: str
    is_section: bool
    metadata: dict[str, Any]  # `json_schema_extra` of the field, see `config.base`
    kinds: tuple[str, ...] = ()  # names of the kinds of a section that has several kinds


@functools.cache
def settings() -> dict[SettingPath, Setting]:
    """Returns every section and setting by place, in the order of `RunConfig`."""
    schema = RunConfig.model_json_schema()
    table: dict[SettingPath, Setting] = {}

    def definition(node: dict) -> dict:
        return schema["$defs"][node["$ref"].split("/")[-1]]

    def add_section(section: dict, place: SettingPath, defaults: dict[str, Any]) -> None:
        for name, node in section["properties"].items():
            add(node, (*place, name), defaults.get(name, node.get("default", REQUIRED)))

    def add(node: dict, place: SettingPath, default: Any) -> None:
        """Adds a setting, or a section and all settings in this section."""
        (inner,) = (option for option in node.get("anyOf", [node]) if option.get("type") != "null")
        options = {definition(option)["properties"]["kind"]["const"]: option for option in inner.get("oneOf", [])}
        kind = f"section of kind {' | '.join(options)}" if options else "section" if "$ref" in inner else _kind(inner)
        kind += " or null" * ("anyOf" in node)
        is_section = bool(options) or "$ref" in inner
        table[place] = Setting(kind, default, node.get("description", ""), is_section, node, tuple(options))
        if "$ref" in inner:
            add_section(definition(inner), place, default if isinstance(default, dict) else {})
        for name, option in options.items():
            add_section(definition(option), (*place, f"kind={name}"), {})
        sections = [option for option in inner.get("items", {}).get("oneOf", []) if "$ref" in option]
        for option in sections:  # the entries are sections of a list
            table[(*place, ENTRY)] = Setting(_kind(inner["items"]), REQUIRED, definition(option)["description"], True, {})
            add_section(definition(option), (*place, ENTRY), {})
        entries = inner.get("additionalProperties")
        if isinstance(entries, dict) and "oneOf" in entries:
            add(entries, (*place, ANY), REQUIRED)

    add_section(schema, (), {})
    return table


@functools.cache
def _prefixes() -> frozenset[SettingPath]:
    """Returns all places and all prefixes of places."""
    return frozenset(place[:depth] for place in settings() for depth in range(len(place) + 1))


def path_of(names: Sequence[str]) -> SettingPath | None:
    """Returns the first place that matches a key path, or None. A key path may omit kinds.

    Where the place has `*`, the key path has a name of the mapping. Where the place has `[]`, the key path has the
    number of an entry, such as `[2]`. An entry of `mix_with` has the same settings as the section with `mix_with`.
    """
    text = re.sub(rf"\n{MIX_WITH}\n\[\d*\]", "", "\n".join(["", *names]))
    names = text.split("\n")[1:]
    places: list[SettingPath] = [()]
    for name in names:
        name = ENTRY if name.startswith("[") else name
        steps = [(kind, step) for kind in (None, *KINDS) for step in (name, ANY)]
        candidates = [(*place, *filter(None, step)) for place in places for step in steps]
        places = [candidate for candidate in candidates if candidate in _prefixes()]
    return places[0] if places else None


def find_setting(names: Sequence[str]) -> Setting | None:
    """Returns the setting at a key path, or None if there is none.

    For an entry of a mapping of plain values, returns the setting of the mapping.
    """
    for length in range(len(names), 0, -1):
        setting = settings().get(path_of(names[:length]) or ())
        if setting is not None:
            return setting if length == len(names) or setting.kind.startswith("mapping") else None
    return None


def without_kinds(place: Sequence[str]) -> SettingPath:
    """Returns the key path of a place, as a settings file has it: without kinds."""
    return tuple(name for name in place if not name.startswith("kind="))


def settings_help(above: str | None = None) -> str:
    """Returns one line per setting: key path, type and bounds, default, description.

    If `above` is given, only the lines of this setting, or of this section and its settings, are returned. Raises
    `ValueError`, with the nearest names, if `above` is unknown.
    """
    names, lines = () if above is None else tuple(above.replace(ENTRY, f".{ENTRY}").split(".")), []
    for place, setting in settings().items():
        if ANY in place:  # left out, because each kind of reward already has lines
            continue
        if without_kinds(place)[: len(names)] != names and dotted(place) != above:
            continue
        if setting.is_section:
            default = " = null" if setting.default is None else ""
        elif setting.default is REQUIRED:
            default = ", required"
        else:
            default = f" = {as_yaml(setting.default)}"
        lines.append(f"{dotted(place)}  {setting.kind}{default}  {setting.description}")
    if not lines:
        known = sorted({".".join(without_kinds(place)) for place in settings() if ANY not in place})
        same_end = [name for name in known if name.split(".")[-1] == names[-1]]
        near = same_end or difflib.get_close_matches(above, known, n=3)
        sections = [name for name in known if "." not in name]
        hint = f"did you mean {' or '.join(near[:3])}?" if near else f"there are {', '.join(sections)}"
        raise ValueError(f"no setting {one_line(above) or repr(above)}; {hint}")
    return "\n".join(lines)


def dotted(place: SettingPath) -> str:
    """Returns a place as text, such as `ppo.reward[http].url`."""
    return re.sub(r"\.kind=(\w+)", r"[\1]", ".".join(place)).replace(".[", "[")


def _kind(schema: dict) -> str:
    """Returns the type and bounds, as text, of a schema that is not a section."""
    if "enum" in schema or "const" in schema:
        return " | ".join(as_yaml(value) for value in schema.get("enum", [schema.get("const")]))
    if "oneOf" in schema:  # the schema is of entries of a list
        return " | ".join("section" if "$ref" in option else _kind(option) for option in schema["oneOf"])
    if "$ref" in schema:
        return "section"
    if schema["type"] == "change":
        return "float > 0 or percentage"
    if schema["type"] == "object":
        return "mapping of names"
    if schema["type"] == "array":
        items = _kind(schema["items"])
        return f"{'non-empty ' if schema.get('minItems') else ''}list of {items}"
    kind = {"integer": "int", "number": "float", "boolean": "true | false", "string": "text"}[schema["type"]]
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = (LARGEST, LARGEST_FLOAT, -LARGEST_FLOAT)  # bounds of every number; only errors name them
    bounds = [f"{sign} {as_yaml(schema[name])}" for name, sign in signs.items() if schema.get(name, LARGEST) not in limits]
    return " ".join([kind, " and ".join(bounds)]).strip()


def describe(value: Any) -> str:
    """Returns a value in the words of a message, such as `the text "abc"`."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"the list {as_yaml(value)}"
    return f"the text {json.dumps(one_line(value), ensure_ascii=False)}" if isinstance(value, str) else as_yaml(value)


def as_yaml(value: Any) -> str:
    """Returns a value as in a YAML file, on one line of at most 80 characters."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(as_yaml(item) for item in value)}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {as_yaml(item)}' for key, item in value.items() if item is not None)}}}"
    elif isinstance(value, float):
        text = repr(value) if math.isfinite(value) else f".{value}".replace(".-", "-.")
    elif isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_/][\w./:-]*", value) and value.lower() not in ("null", "true", "false")
        text = value if plain else json.dumps(value, ensure_ascii=False)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str) -> str:
    """Returns text on one line of at most 160 characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= 160 else text[:157] + "..."

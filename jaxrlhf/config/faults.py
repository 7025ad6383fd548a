"""Turns a validation error into one line. The line says what is wrong, where it is, and what would be right."""

import difflib
import re
from collections.abc import Mapping

from pydantic import ValidationError

from jaxrlhf.config.base import LARGEST, LARGEST_FLOAT
from jaxrlhf.config.table import REQUIRED, SettingPath, describe, dotted, one_line, path_of, settings, without_kinds

Origins = Mapping[SettingPath, str]
"""The source of each key: "FILE:LINE" or "override 'KEY=VALUE'"."""


def explain(error: ValidationError, path: str, origins: Origins) -> str:
    """Returns one line about the fault that is most likely the cause of the error."""
    faults = error.errors(include_url=False)
    # If an item of a list is bad, pydantic also reports that the list is too short. So a fault is ignored if there is
    # another fault inside its place.
    faults = [f for f in faults if not any(g["loc"][: len(f["loc"])] == f["loc"] != g["loc"] for g in faults)]
    faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")  # a misspelt key often explains a missing key
    fault = faults[0]
    place = _place(fault["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{_origin(fault, without_kinds(place), path, origins)}: {_message(fault, place)}{more}"


def _place(location: tuple[str | int, ...]) -> SettingPath:
    """Returns the place of a fault. Entries of lists are numbered, such as `[2]`, only if the entries are sections."""
    place: list[str] = []
    for part in location:
        if isinstance(part, str):
            if not (place and place[-1].startswith("[") and part in ("set", "alarm")):  # the tags of `config.alarms`
                place.append(part)
        elif path_of((*place, f"[{part}]")):
            place.append(f"[{part}]")
    return tuple(place)


def _origin(fault: dict, keys: SettingPath, path: str, origins: Origins) -> str:
    """Returns the place that set the invalid key, which is a line of a file or an override."""
    if fault["type"] == "value_error":  # the fault of a section; an override of a key in the message is the cause
        words = re.findall(r"\w+", fault["msg"])
        for known, where in reversed(origins.items()):
            if known[: len(keys)] == keys and where.startswith("override ") and known[-1] in words:
                return where
    if fault["type"] == "union_tag_invalid":
        keys = (*keys, "kind")
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return origins[keys[:length]]
    return path


def _message(fault: dict, place: SettingPath) -> str:
    name, known = dotted(without_kinds(place)), path_of(place)
    setting = settings().get(known or ())
    if fault["type"] == "extra_forbidden":
        return f"unknown key {name}; {_nearest(place)}"
    if fault["type"] == "union_tag_invalid":
        return f"{name}.kind must be {' | '.join(setting.kinds)}, not {fault['ctx']['tag'].removeprefix('kind=')}"
    if fault["type"] == "missing" and setting is not None:
        return f"{name} is missing; give {setting.kind}: {setting.description}"
    if fault["type"] == "value_error" or setting is None:
        reason = one_line(fault["msg"].removeprefix("Value error, "))
        return f"{name}: {reason}" if name else reason
    if fault["type"] == "too_short" and isinstance(fault["input"], dict):
        return f"{name} must have at least one entry"
    if fault["type"] in ("too_short", "too_long") and setting.metadata.get("maxItems") is not None:
        return f"{name} must have {setting.metadata['maxItems']} entries, not {fault['ctx']['actual_length']}"
    if fault["type"] == "string_pattern_mismatch":
        return f"{name} must have only letters, digits and _, not {describe(fault['input'])}"
    kind = re.sub(r"\bsection( of kind .*)?", "a section with keys", setting.kind)
    hint = ""
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        hint = "; put a text that looks like a number in quotes"
    if fault["type"] == "string_type" and isinstance(fault["input"], dict):
        hint = "; YAML reads a text with a colon at its end, or before a blank, as a section"
    in_list = fault["loc"] and isinstance(fault["loc"][-1], int)
    if in_list and not name.endswith("]"):  # the place of a list of sections has the number
        name, kind = f"{name}[{fault['loc'][-1]}]", re.sub(r"^(non-empty )?list of (.*?)( or null)?$", r"\2", kind)
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        near = difflib.get_close_matches(fault["input"], kind.split(" | "), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    if fault["input"] is None and setting.default is not REQUIRED:
        hint = "" if in_list else "; leave it out for its default"
    if fault["type"] == "less_than_equal" and fault["ctx"]["le"] in (LARGEST, LARGEST_FLOAT):
        kind = f"at most {fault['ctx']['le']:g}".replace("2.14748e+09", str(LARGEST))
    return f"{name} must be {kind}, not {describe(fault['input'])}{hint}"


def _nearest(place: SettingPath) -> str:
    """Returns advice for an unknown key. This is the key that was probably meant, or the list of valid keys."""
    *section, name = place
    above = path_of(section) or ()
    below = [other for other in settings() if other[: len(above)] == above and len(other) > len(above)]
    known = [other[-1] for other in below if len(other) == len(above) + 1]
    keys = without_kinds(section)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {dotted((*keys, close[0]))}?"
    if above and above[-1].startswith("kind="):
        others = [other[-2] for other in settings() if other[:-2] == above[:-1] and other[-1] == name]
        theirs = f"it belongs to {' and '.join(other.replace('=', ': ') for other in others)}; " if others else ""
        return f"{theirs}kind: {above[-1].removeprefix('kind=')} has the keys {', '.join(known)}"
    joined = {re.sub(r"\W|_", "", "".join(other[len(above) :])): other for other in below}  # klcoef -> kl.coef
    match = joined.get(re.sub(r"\W|_", "", name))
    deeper = [other for other in below if other[-1] == name] or ([match] if match else [])
    if deeper:
        return f"did you mean {' or '.join(dict.fromkeys('.'.join(without_kinds(other)) for other in deeper[:3]))}?"
    return f"the keys {'of ' + dotted(keys) if keys else 'at the top level'} are {', '.join(known)}"

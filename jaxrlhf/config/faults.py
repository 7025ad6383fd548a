"""What is wrong with a file's settings, in one line: what, where, and what would be right."""

import difflib
import re
from collections.abc import Mapping

from pydantic import ValidationError

from jaxrlhf.config.table import SettingPath, described, one_line, path_of, settings, without_kinds

Origins = Mapping[SettingPath, str]
"""Where each key was given: "FILE:LINE" or "override 'KEY=VALUE'"."""


def explain(error: ValidationError, path: str, origins: Origins) -> str:
    """One line for the first fault: what, where, what would be right."""
    faults = error.errors(include_url=False)
    # A list with one bad item is also reported as too short: keep the fault that is nearest to the cause.
    faults = [f for f in faults if not any(len(g["loc"]) > len(f["loc"]) == _shared(f, g) for g in faults)]
    faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")  # a misspelt key often explains a missing one
    fault = faults[0]
    place = tuple(part for part in fault["loc"] if isinstance(part, str))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{_origin(fault, without_kinds(place), path, origins)}: {_message(fault, place)}{more}"


def _shared(one: dict, other: dict) -> int:
    """How many leading parts the places of two faults have in common."""
    pairs = zip(one["loc"], other["loc"])
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one["loc"]), len(other["loc"])))


def _origin(fault: dict, keys: SettingPath, path: str, origins: Origins) -> str:
    """File and line, or override, that the fault comes from."""
    if fault["type"] == "value_error":  # about a whole section: an override of a key that it names is the cause
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
    dotted, known = ".".join(without_kinds(place)), path_of(place)
    setting = settings().get(known or ())
    if fault["type"] == "extra_forbidden":
        return f"unknown key {dotted}; {_nearest(place)}"
    if fault["type"] == "union_tag_invalid":
        return f"{dotted}.kind must be {' | '.join(setting.kinds)}; given {fault['ctx']['tag'].removeprefix('kind=')}"
    if fault["type"] == "missing" and setting is not None:
        return f"{dotted} is missing; it takes {setting.kind}: {setting.description}"
    if fault["type"] == "value_error" or setting is None:
        reason = one_line(fault["msg"].removeprefix("Value error, "))
        return f"{dotted}: {reason}" if dotted else reason
    kind = re.sub("^section( of kind .*)?", "a section with keys of its own", setting.kind)
    hint = ""
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        hint = "; text that looks like a number is written in quotes"
    return f"{dotted} must be {kind}; given {described(fault['input'])}{hint}"


def _nearest(place: SettingPath) -> str:
    """The known key that was probably meant, or the list of known ones."""
    *section, name = place
    above = path_of(section) or ()
    below = [other for other in settings() if other[: len(above)] == above and len(other) > len(above)]
    known = [other[-1] for other in below if len(other) == len(above) + 1]
    dotted = without_kinds(section)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"the nearest known one is {'.'.join((*dotted, close[0]))}"
    if above and above[-1].startswith("kind="):
        others = [other[-2] for other in settings() if other[:-2] == above[:-1] and other[-1] == name]
        theirs = f"is for {' and '.join(other.replace('=', ': ') for other in others)}; " if others else ""
        return f"{theirs}kind: {above[-1].removeprefix('kind=')} takes {', '.join(known)}"
    joined = {re.sub(r"\W|_", "", "".join(other[len(above) :])): other for other in below}  # "klcoef" is kl.coef
    run_on = joined.get(re.sub(r"\W|_", "", name))
    deeper = [other for other in below if other[-1] == name] or ([run_on] if run_on else [])
    if deeper:
        return f"there is {' and '.join(dict.fromkeys('.'.join(without_kinds(other)) for other in deeper[:3]))}"
    return f"known ones {'in ' + '.'.join(dotted) if dotted else 'here'}: {', '.join(known)}"

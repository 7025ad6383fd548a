"""Compares the settings of two runs, as plain YAML or JSON data."""

from typing import Any

from jaxrlhf.config.table import as_yaml

ABSENT = "absent"  # the value of a key that one side lacks
Change = tuple[str, Any, Any]  # key path, old value, new value


def differences(old: dict[str, Any], new: dict[str, Any], above: str = "") -> list[Change]:
    """Returns (key path, old value, new value) of every difference, in the order of `new`.

    If one side lacks a key, its value there is "absent". If one side lacks a section, the section is one difference.
    """
    changes = []
    for key in [*new, *(key for key in old if key not in new)]:
        path = f"{above}.{key}" if above else str(key)
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, path)
        # 1, 1.0 and True are equal in Python but different settings.
        elif before != after or type(before) is not type(after):
            changes.append((path, before, after))
    return changes


def describe_change(change: Change) -> str:
    """Returns the text "KEY was OLD, is now NEW"."""
    key, before, after = change
    old, new = ("a section" if isinstance(value, dict) else as_yaml(value) for value in (before, after))
    return f"{key} was {old}, is now {new}"

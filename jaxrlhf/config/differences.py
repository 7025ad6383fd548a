"""Which settings differ between two trees of plain data, as YAML and JSON have them."""

from typing import Any

ABSENT = "absent"  # the value of a key that one side lacks
Change = tuple[str, Any, Any]  # key path, old value, new value


def differences(old: dict[str, Any], new: dict[str, Any], above: str = "") -> list[Change]:
    """(key path, old value, new value) where two trees of settings differ, in the order of `new`.

    A key that one side lacks has the value "absent" there; a section on one side only is named as a whole.
    """
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        path = f"{above}.{key}" if above else str(key)
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, path)
        # 1 and True, or 1 and 1.0, are equal in Python and yet different settings.
        elif before != after or type(before) is not type(after):
            found.append((path, before, after))
    return found


def described(change: Change) -> str:
    """One change of settings in words."""
    key, before, after = change
    return f"{key} was {_short(before)}, is now {_short(after)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."

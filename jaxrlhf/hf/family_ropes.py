"""What a row of the table of families says of rotary positions, and how `config.json` is read and written by it.

Both styles are known: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling` (before).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.errors import UserError, short
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.rope import SCALINGS, Rope, factor_count, read_rope, rope_entry, rope_kind, unused_entries
from jaxrlhf.tracking.notices import notice

SLIDING, FULL = "sliding_attention", "full_attention"  # names in `layer_types`
LENGTH = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Ropes:
    """Rotary positions of a family, and where older files keep their numbers."""

    theta: float = 10000.0  # transformers' default
    theta_entry: str = "rope_theta"
    share: float = 1.0  # of a head's dimensions that turn, by default
    share_entry: str | None = None  # None: all must turn
    local_theta: float | None = None  # of layers with a window, where they have their own
    types: tuple[str, ...] = tuple(SCALINGS)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"su": "longrope"})  # older names of types
    trained_length: int | None = None  # transformers' default of the entry LENGTH beside the rope, where it has one
    skipped: Callable[[dict[str, Any], int], bool] | None = None  # (config.json, layer): a layer without


def read_ropes(
    ropes: Ropes, document: dict[str, Any], read: dict[str, Any], local: bool, where: str
) -> Rope:
    """Rotary positions of the layers with a window (`local`) or without; `read` are the fields read so far.

    Raises `UserError` naming file and entry. Entries that the type does not use are left out with a notice, as
    transformers leaves them out with a warning.
    """
    # Where both stand, transformers lets rope_scaling win.
    entry = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    given = document.get(entry) or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: {entry} must be an object with rope_theta and rope_type, not {short(given)}")
    theta = document.get(ropes.theta_entry)
    theta = ropes.theta if theta is None else theta
    if ropes.local_theta is not None:  # one rope for each type of layer
        parameters = document.get("rope_parameters") or {}
        scaling = document.get("rope_scaling") or {}
        given = (isinstance(parameters, dict) and parameters.get(SLIDING if local else FULL)) or {}
        if not all(isinstance(part, dict) for part in (parameters, scaling, given)):
            raise UserError(f"{where}: rope_parameters must be an object with one for each of {SLIDING} and {FULL}")
        given = given if local else given | scaling
        local_theta = document.get("rope_local_base_freq")
        if local:
            theta = ropes.local_theta if local_theta is None else local_theta
    share = document.get(ropes.share_entry or "partial_rotary_factor")
    defaults = {
        "rope_theta": theta,
        "partial_rotary_factor": ropes.share if share is None else share,
        LENGTH: read["max_positions"],
        "max_position_embeddings": read["max_positions"],
    }
    try:
        kind = rope_kind(given, ropes.aliases)
        extra = unused_entries(given, kind)
        # Without a type, numbers of a scaling are a mistake. So are objects, which other families have by layer type.
        untyped = given.get("rope_type", given.get("type")) is None
        if extra and (untyped or any(isinstance(given[name], dict) for name in extra)):
            raise ValueError(f"{', '.join(extra)} is not supported with rope_type {kind!r}")
        if extra:
            notice(f"{where}: {entry}: {', '.join(extra)} says nothing with rope_type {kind!r} and is left out")
        outer = document.get(LENGTH, ropes.trained_length)
        if outer is not None and ropes.local_theta is None:
            given = given | {LENGTH: outer}  # beside the rope it wins, in transformers too
        rope = read_rope(given, defaults, kind)
        if rope.kind not in ropes.types:
            raise ValueError(f"rope_type {rope.kind!r} is not supported; known: {', '.join(ropes.types)}")
        if rope.share != 1 and ropes.share_entry is None:
            raise ValueError("partial_rotary_factor is not supported in this family; every dimension must turn")
        pairs, wanted = factor_count(rope), int(read["head_dim"] * rope.share) // 2 if "head_dim" in read else None
        if pairs is not None and pairs != wanted:
            raise ValueError(f"short_factor and long_factor must have {wanted} numbers, not {pairs}")
    except ValueError as error:
        raise UserError(f"{where}: {entry if given else ropes.theta_entry}: {error}") from None
    return rope


def rope_entries(ropes: Ropes, kinds: list[LayerKind]) -> dict[str, Any]:
    """Rope in the newer style and the older one; a family without layers of one kind has its default there."""
    turned = next((k.rope for k in kinds if k.window is None and k.rope), None)
    local = next((k.rope for k in kinds if k.window is not None and k.rope), None)
    main = turned or (local if ropes.local_theta is None else None) or Rope(ropes.theta, ropes.share)
    entries: dict[str, Any] = {"rope_parameters": rope_entry(main), ropes.theta_entry: main.theta}
    if main.kind != "default":
        entries["rope_scaling"] = rope_entry(main)
    if ropes.trained_length is not None and LENGTH in dict(main.numbers):
        entries[LENGTH] = dict(main.numbers)[LENGTH]
    if ropes.share_entry is not None:
        entries[ropes.share_entry] = main.share
        entries["rope_parameters"]["partial_rotary_factor"] = main.share
    if ropes.local_theta is not None:
        local = local or Rope(ropes.local_theta)
        entries["rope_parameters"] = {FULL: rope_entry(main), SLIDING: rope_entry(local)}
        entries["rope_local_base_freq"] = local.theta
    if ropes.skipped is not None:
        entries["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    return entries

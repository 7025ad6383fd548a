"""Shared by all settings: bounded types, the base class of sections, and field metadata."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST, LARGEST_FLOAT = 2**31 - 1, 3e38  # what compiled steps, in int32 and float32, can hold
MAX_LAYERS = 10_000  # of a model; each takes time to build and compile
SECONDS_LIMIT = 1e7  # 115 days; timers of the operating system overflow far above
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=SECONDS_LIMIT, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Overflow = Literal["cut", "drop", "stop"]

# Whether a setting may change when a run is resumed (`json_schema_extra` of its field; see `stages/resuming.py`).
# A field without one of these may not change.
FREE = {"on_resume": "free"}  # yes: later steps do not depend on it
ROUNDING = {"on_resume": "rounding"}  # yes: later steps compute the same, but sums may round differently
EVALUATED = {"on_resume": "evaluated"}  # like CHOICE, if nothing that ends or slows a stage waits for an evaluation
CHOICE = {"on_resume": "choice"}  # if `checkpoints.result` is "last": it decides which checkpoint is the result
LONGER = {"on_resume": "longer"}  # it may grow, if a step does not depend on how many follow, or end at a checkpoint

Remat = Annotated[
    Literal["none", "dots", "full"],
    Field(
        description="what the backward pass recomputes to save memory: nothing (none), everything except products with weights (dots), or each layer from its input (full); no effect on a CPU, where XLA removes it (docs/plan.md)",
        json_schema_extra=ROUNDING,
    ),
]


class Settings(BaseModel):
    """Base class of all sections: immutable, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def number(default: float | None, description: str, **bounds: Any) -> Any:
    """A traced field. It enters compiled steps as an array, so changing it recompiles nothing, and it may be batched."""
    return Field(default, description=description, json_schema_extra={"traced": True}, **bounds)


def metadata(section: type[BaseModel], field: str, name: str) -> Any:
    """An entry of a field's `json_schema_extra`, or None."""
    return (section.model_fields[field].json_schema_extra or {}).get(name)

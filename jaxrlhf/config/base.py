"""Bounded types, the base class of sections, and field metadata, for all modules of settings."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST, LARGEST_FLOAT = 2**31 - 1, 3e38  # largest numbers of compiled steps, in int32 and float32
MAX_LAYERS = 10_000  # largest number of layers of a model; each layer takes time to build and compile
SECONDS_LIMIT = 1e7  # 115 days; much larger numbers overflow timers of the operating system
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=SECONDS_LIMIT, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Overflow = Literal["cut", "drop", "stop"]

# Rules that say whether a setting may change when a run is resumed (see `stages/resuming.py`). The rule of a setting is
# in `json_schema_extra` of its field. A setting without a rule may not change.
FREE = {"on_resume": "free"}  # may change: later steps do not depend on it
ROUNDING = {"on_resume": "rounding"}  # may change: later steps compute the same, but sums may round differently
EVALUATED = {"on_resume": "evaluated"}  # may change as CHOICE does, if no early stopping and no learning rate depends on evaluations
CHOICE = {"on_resume": "choice"}  # may change if `checkpoints.result` is "last"; else it decides which checkpoint is the result
LONGER = {"on_resume": "longer"}  # may grow if steps do not depend on the number of steps; may fall to the last checkpoint

Remat = Annotated[
    Literal["none", "dots", "full", "offload"],
    Field(
        description="what the backward pass recomputes to save memory: nothing (none), everything except products with weights (dots), or each layer from its input (full), which offload keeps in the memory of the host; has no effect on a CPU, because XLA removes the recomputation there (docs/plan.md)",
        json_schema_extra=ROUNDING,
    ),
]


class Settings(BaseModel):
    """Base class of all sections. Sections are immutable and strictly typed, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def number(default: float | None, description: str, **bounds: Any) -> Any:
    """Returns a traced field. Its value is an array argument of compiled steps, so a new value needs no recompilation."""
    return Field(default, description=description, json_schema_extra={"traced": True}, **bounds)


def metadata(section: type[BaseModel], field: str, name: str) -> Any:
    """Returns the entry `name` of a field's `json_schema_extra`, or None."""
    return (section.model_fields[field].json_schema_extra or {}).get(name)

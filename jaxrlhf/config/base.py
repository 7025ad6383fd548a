"""What all settings share: types with their bounds, the base class of sections, and what is noted of a field."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Overflow = Literal["cut", "drop", "stop"]

Remat = Literal["none", "dots", "full"]
REMAT = (
    "what the backward pass computes again, to save memory; none: nothing; dots: all but the products with weights; "
    "full: each layer from its input. XLA undoes it on a CPU (docs/plan.md)"
)

# Notes on a field (its `json_schema_extra`). On continuing a run (`stages/resuming.py`):
FREE = {"on_continuing": "free"}  # may change: no step that is still to come depends on it
ROUNDING = {"on_continuing": "rounding"}  # may change: the same operations, sums may round otherwise
CHOICE = {"on_continuing": "choice"}  # may change as long as the run's result is its last step
LONGER = {"on_continuing": "longer"}  # may grow where a step is the same however many follow
# A field without one of these may not change.


class Settings(BaseModel):
    """Base of all sections: immutable, strict types, no unknown keys; hashable where they enter compiled steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def number(default: float | None, description: str, **bounds: Any) -> Any:
    """A field that enters compiled steps as an array (traced): changing it compiles nothing, and it may be batched."""
    return Field(default, description=description, json_schema_extra={"traced": True}, **bounds)


def names(default: tuple[str, ...] | None, description: str, **kwargs: Any) -> Any:
    """A field for a list of names; a YAML list becomes a tuple, so that the section stays hashable."""
    return Field(default, description=description, strict=False, **kwargs)


def note(section: type[BaseModel], field: str, name: str) -> Any:
    """What a field's notes say under `name`; None where they say nothing."""
    return (section.model_fields[field].json_schema_extra or {}).get(name)

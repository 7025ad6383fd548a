"""What all settings share: types with their bounds, and the base class of sections."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Overflow = Literal["cut", "drop", "stop"]


def remat_policy(value: Any) -> Any:
    """What a `remat` of true or false, as the setting once was, is called now."""
    return ("full" if value else "none") if isinstance(value, bool) else value


Remat = Annotated[Literal["none", "dots", "full"], BeforeValidator(remat_policy)]
REMAT = (
    "what the backward pass computes again, to save memory; none: nothing; dots: all but the products with weights; "
    "full: each layer from its input. XLA undoes it on a CPU (see README)"
)


class Settings(BaseModel):
    """Base of all sections: immutable, strict types, no unknown keys; hashable where they enter compiled steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def names(default: tuple[str, ...] | None, description: str, **kwargs: Any) -> Any:
    """A field for a list of names; a YAML list becomes a tuple, so that the section stays hashable."""
    return Field(default, description=description, strict=False, **kwargs)

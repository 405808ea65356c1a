"""What the sections of a configuration file have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# A string that says something: an unset variable of a shell must not pass for "none".
Text = Annotated[str, Field(pattern=r"\S")]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
HueShift = Annotated[float, Field(ge=0.0, le=0.5)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

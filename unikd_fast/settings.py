"""Settings of components: frozen dataclasses next to the component, with a range and a docstring per field.

The configuration, its schema and its reference page are made of these classes, and validated there by pydantic. The
component itself does not need pydantic.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le


class _NotBlank:
    """A string that says something: an unset variable of a shell must not pass for "none"."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.str_schema(pattern=r"\S")


LARGEST_FP32 = 3.4e38


class _FitsFp32:
    """A number that tensors can hold: a larger one would fail in the first step."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: float) -> float:
            if value > LARGEST_FP32:
                raise PydanticCustomError("fits_fp32", "Input should be less than 3.4e38, the largest number of fp32")
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


Text = Annotated[str, _NotBlank()]
PositiveInt = Annotated[int, Ge(1)]
LARGEST_IMAGE = 4096
ImageSize = Annotated[int, Ge(1), Le(LARGEST_IMAGE)]
"""Height and width of square images, in pixels."""
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
NonNegative = Annotated[float, Ge(0.0), _FitsFp32()]
Positive = Annotated[float, Gt(0.0), _FitsFp32()]

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that a configuration validates strictly.

    Example:
        >>> @settings
        ... class Ramp:
        ...     epochs: NonNegative = 20.0
        >>> Ramp(epochs=5.0)
        Ramp(epochs=5.0)
    """
    cls.__pydantic_config__ = {  # type: ignore[attr-defined]
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
    }
    return dataclass(frozen=True, kw_only=True)(cls)

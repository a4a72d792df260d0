"""What every group of settings has in common: it is frozen, rejects unknown names, and has bounds."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationInfo, field_validator

# Upper bounds, well above what any run takes: a larger number is a mistake, and would end in an overflow, a list that no memory
# holds, or a loop that never ends. Fields with other bounds state them.
MOST = 10**9  # of samples, records, steps
MOST_TOKENS = 1 << 24  # of a forest, whose attention counts with 32 bits
MOST_NEW_TOKENS = 1 << 17  # of a response, for each of which a random number is drawn beforehand


class Section(BaseModel):
    """A group of settings. Instances can't be changed, and unknown names are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed; the copy is validated."""
        values = {name: getattr(self, name) for name in type(self).model_fields} | changes
        copy = type(self).model_validate(values)
        for name in self.__private_attributes__:
            setattr(copy, name, getattr(self, name))
        return copy

    @field_validator("*", mode="before")
    @classmethod
    def _check_plain_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Read an empty heading as a section of defaults, and reject true and false where a number or text is expected."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
            return {}  # a heading with nothing under it
        if isinstance(value, bool) and annotation is not bool:  # pydantic would read true as 1
            raise ValueError(f"expected no true or false here, found {str(value).lower()}")
        if isinstance(value, str) and "\0" in value:  # no path has one
            raise ValueError(f"expected text without a NUL, found {value!r}")
        return value


class Seeded(Section):
    """Settings of something random. The seed is the run's (`Config.seed`), not a setting of the section."""

    _seed: int = PrivateAttr(0)

    @property
    def seed(self) -> int:
        """The seed that `seeded` has set, else 0."""
        return self._seed

    def seeded(self, seed: int) -> Self:
        """Return a copy with this seed."""
        copy = self.model_copy()
        copy._seed = seed
        return copy

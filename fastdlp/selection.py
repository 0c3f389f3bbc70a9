"""Which backend each unit of a run uses, where `fastdlp.engine.autotune` measured it. Standard library only.

Written down, it is a value of `--backend`: a run folder's config holds it, so a resumed run takes the same forms and
measures nothing, also on another machine. Where Triton does not run there, it is refused as `--backend triton` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """The form, "torch" or "triton", of a unit for a number of rows, and why."""

    unit: str
    rows: int
    form: str
    why: str = field(default="", compare=False)


@dataclass(frozen=True)
class Selection:
    """Choices for one or a few numbers of rows a unit. seconds: that it took to make them; 0: they were kept."""

    choices: tuple[Choice, ...]
    seconds: float = field(default=0.0, compare=False)

    def form(self, unit: str, rows: int) -> str:
        """That of the nearest number of rows, as a ratio; torch for a unit that was not measured."""
        own = [choice for choice in self.choices if choice.unit == unit]
        return min(own, key=lambda c: abs(math.log(c.rows / max(rows, 1))), default=Choice(unit, 1, "torch")).form

    @property
    def reason(self) -> str:
        """All choices in a line, and how long it took to make them."""
        made = f"measured in {self.seconds:.0f} s" if self.seconds else "as measured before"
        return "; ".join([f"{c.unit} of {c.rows} rows {c.form} ({c.why})" for c in self.choices] + [made])

    def __str__(self) -> str:
        """As `read_backend` reads it; one word where all units take one form."""
        forms = {choice.form for choice in self.choices}
        return forms.pop() if len(forms) == 1 else ",".join(f"{c.unit}@{c.rows}={c.form}" for c in self.choices)


def read_backend(text: str) -> str | Selection:
    """A value of `--backend` that `TrainConfig.check` passed: one word, or what `Selection` wrote."""
    if "@" not in text:
        return text
    fields = (entry.replace("=", "@").split("@") for entry in text.split(","))
    return Selection(tuple(Choice(unit, int(rows), form) for unit, rows, form in fields))


def form_of(backend: str | Selection, unit: str, rows: int) -> str:
    """The form of a unit for this many rows."""
    return backend if isinstance(backend, str) else backend.form(unit, rows)

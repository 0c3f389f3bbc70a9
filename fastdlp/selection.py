"""The backend of each unit of a run, as `fastdlp.engine.autotune` selects it. Standard library only.

Its text is a value of `--backend`. A run folder's config holds it, so that a resumed run uses the same backends without
measuring again, also on another machine. Where Triton does not run, it is refused as `--backend triton` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """The backend, "torch" or "triton", of a unit for a number of rows, and the reason."""

    unit: str
    rows: int
    backend: str
    why: str = field(default="", compare=False)


@dataclass(frozen=True)
class Selection:
    """Choices for one or a few numbers of rows a unit. seconds: duration of the measurements; 0 from the cache."""

    choices: tuple[Choice, ...]
    seconds: float = field(default=0.0, compare=False)

    def backend(self, unit: str, rows: int) -> str:
        """The backend for the nearest number of rows by ratio; torch for a unit that was not measured."""
        own = [choice for choice in self.choices if choice.unit == unit]
        return min(own, key=lambda c: abs(math.log(c.rows / max(rows, 1))), default=Choice(unit, 1, "torch")).backend

    @property
    def reason(self) -> str:
        """All choices in a line, and the duration of the measurements."""
        source = f"measured in {self.seconds:.0f} s" if self.seconds else "as measured before"
        return "; ".join([f"{c.unit} of {c.rows} rows {c.backend} ({c.why})" for c in self.choices] + [source])

    def __str__(self) -> str:
        """The value of --backend: "torch" or "triton" where all units have the same one."""
        backends = {choice.backend for choice in self.choices}
        return (
            backends.pop() if len(backends) == 1 else ",".join(f"{c.unit}@{c.rows}={c.backend}" for c in self.choices)
        )


def read_backend(text: str) -> str | Selection:
    """A value of --backend that `TrainConfig.check` accepts: one backend, or the text of a `Selection`."""
    if "@" not in text:
        return text
    fields = (entry.replace("=", "@").split("@") for entry in text.split(","))
    return Selection(tuple(Choice(unit, int(rows), backend) for unit, rows, backend in fields))


def backend_of(backend: str | Selection, unit: str, rows: int) -> str:
    """The backend of a unit for a number of rows."""
    return backend if isinstance(backend, str) else backend.backend(unit, rows)

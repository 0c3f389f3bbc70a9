"""Numbers and partitions in words, for tables and headings."""

from __future__ import annotations


def number(value: float | None, spec: str) -> str:
    """A formatted number; a dash for None."""
    return "–" if value is None else format(value, spec)


def scheme_text(scheme: str, beta: float | None, classes_per_client: int | None) -> str:
    """How a partition was drawn, for a heading."""
    if scheme == "dirichlet":
        return "Dirichlet" if beta is None else f"Dirichlet β = {beta:g}"
    return f"{classes_per_client} classes per client" if scheme == "pathological" else scheme

"""Command-line options generated from `TrainConfig`, so that the command line and Python never differ.

Every option is None when it is not given, which distinguishes an explicit choice from a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdlp.config import EMBEDDED_MODEL, OPTIONS, PROTOCOLS, Option, TrainConfig
from fastdlp.data.registry import DATASETS
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method, resolve


def record_option(*flags: str, help: str, metavar: str | None = None) -> Any:
    """An option of train and sweep beside those of `TrainConfig`."""
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=OPTIONS["out"].group)


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
SummaryJson = Annotated[bool, record_option("--json", help="Print the summary as JSON on stdout.")]
Quiet = Annotated[bool, record_option("--quiet", "-q", help="Show nothing but errors.")]
Command = Callable[..., None]


def config_options(
    names: Collection[str] = tuple(OPTIONS),
    several: Collection[str] = (),
    groups: bool = True,
    changed: Mapping[str, Mapping[str, Any]] = {},
) -> Callable[[Command], Command]:
    """Decorate a Typer command, which gets the given options as a dict in its first parameter.

    Args:
        names: fields of `TrainConfig`, each of which becomes an option.
        several: of `names`, those that may be given more than once; their values are lists.
        groups: whether --help shows the options under the headings of `TrainConfig`.
        changed: arguments of `typer.Option` for some of `names`, in place of those from `TrainConfig`.
    """

    def decorate(command: Command) -> Command:
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = []
        for option in (OPTIONS[name] for name in names):
            kind: Any = option.kind
            text = option.help.replace("{datasets}", ", ".join(DATASETS))
            if option.name in several:
                kind, text = list[kind], f"{text} May be given more than once."
            own: dict[str, Any] = {"help": text, "show_default": _default(option)}
            own |= {"rich_help_panel": option.group} if groups else {}
            own |= changed.get(option.name, {})
            switch = "/--no-cuda-graph" if option.name == "cuda_graph" else ""  # the one switch that is on by itself
            hint = Annotated[kind | None, typer.Option(option.flag + switch, **own)]
            parameters.append(inspect.Parameter(option.name, keyword, default=None, annotation=hint))

        def wrapped(**values: Any) -> None:
            given = {name: value for name in names if (value := values.pop(name)) is not None}
            command(given, **values)

        _, *own_parameters = inspect.signature(command, eval_str=True).parameters.values()
        parameters += [p.replace(kind=keyword) for p in own_parameters]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
        return wrapped

    return decorate


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse options that are invalid, that the chosen method does not read or that the partition file determines.

    Loads neither torch nor data.

    Raises:
        FastdlpError: names the option.
    """
    method = make_method(resolve(TrainConfig(**given)))
    for option in (OPTIONS[name] for name in given):
        if option.of_methods and option.name not in method.reads():
            raise FastdlpError(f"{option.flag} does nothing for --method {method.name}: leave it out")
    fixed = [OPTIONS[name].flag for name in given if OPTIONS[name].in_partition_file]
    if fixed and Path(given.get("partition", "")).is_file():
        raise FastdlpError(
            f"--partition {given['partition']} determines which client holds which samples: leave out "
            f"{', '.join(fixed)}"
        )


def _default(option: Option) -> str | bool:
    """The default that --help shows: the config's, or how it follows from protocol and model."""
    if option.default is not None:
        return False if option.kind is bool else str(option.default)
    parts = [f"{value} ({name})" for name, value in zip(PROTOCOLS, option.protocols or ())]
    if option.fallback is not None:
        parts = [option.fallback if option.kind is str else f"{option.fallback:g}"]
    if option.demonstration is not None:
        parts.append(f"{option.demonstration} ({EMBEDDED_MODEL})")
    methods = "the method's, else " if option.fallback is not None or option.demonstration is not None else ""
    return methods + ", ".join(parts) if parts else False

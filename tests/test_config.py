"""Defaults, presets and their precedence. The refusals are in test_cli_errors.py."""

from __future__ import annotations

import dataclasses

import pytest

from fastdlp.config import OPTIONS, PROTOCOLS, TrainConfig, differences
from fastdlp.errors import FastdlpError
from fastdlp.methods import METHODS, make_method, resolve
from tests.conftest import CLI


@pytest.mark.parametrize("command", [("train",), ("sweep",)])
def test_every_option_is_on_the_command_line(command: tuple[str, ...], cli: CLI) -> None:
    code, out, _ = cli(*command, "--help")
    assert code == 0
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert [option.flag for option in OPTIONS.values() if f"{option.flag} " not in out] == []
    assert all(option.help and option.group for option in OPTIONS.values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_fills_what_is_not_given(protocol: str) -> None:
    config = TrainConfig(model="ViT-B-32-quickgelu", protocol=protocol).resolved()  # type: ignore[arg-type]
    for name, value in PROTOCOLS[protocol].items():
        assert getattr(config, name) == value
    assert config.lr == config.gate_lr == 1e-5
    assert config.resolved() == config


@pytest.mark.parametrize(("name", "value"), list(PROTOCOLS["reference"].items()))
def test_each_switch_alone(name: str, value: object) -> None:
    config = TrainConfig(model="ViT-B-32-quickgelu", **{name: value}).resolved()  # type: ignore[arg-type]
    for other, preset in PROTOCOLS["paper"].items():
        assert getattr(config, other) == (value if other == name else preset)


def test_the_demonstration_budget_is_the_embedded_model_s_alone() -> None:
    assert (TrainConfig().resolved().rounds, TrainConfig().resolved().lr) == (20, 1e-3)
    assert TrainConfig(rounds=3, lr=0.5).resolved().rounds == 3
    assert TrainConfig(lr=0.5).resolved().gate_lr == 0.5


def test_options_of_methods_are_those_that_methods_read() -> None:
    read = [make_method(resolve(TrainConfig(method=name))).reads() for name in METHODS if name != "fedfft"]
    assert set.union(*read) == {option.name for option in OPTIONS.values() if option.of_methods}


def test_json_round_trip_and_foreign_json() -> None:
    config = TrainConfig(beta=0.01, trace=True).resolved()
    assert TrainConfig.from_json(config.to_json()) == config
    for text in ("", "[]", '{"betta": 1}'):
        with pytest.raises(FastdlpError, match="not written by this version"):
            TrainConfig.from_json(text)


def test_differences_name_the_flag_and_ignore_places() -> None:
    config = TrainConfig().resolved()
    assert differences(config, dataclasses.replace(config, out="elsewhere", data_dir="x")) == []
    assert differences(config, dataclasses.replace(config, lr=0.5)) == ["--lr 0.001 (now 0.5)"]

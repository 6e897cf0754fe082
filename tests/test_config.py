"""Registries and configuration: what is misspelt is refused with the nearest right name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from overproof.config import RunConfig, merge, parse_override, resolve
from overproof.errors import FolderError, UnknownNameError, UsageError
from overproof.folder import read_arrays, read_json, read_toml, write_toml
from overproof.registry import Registry, convert, load_plugin


def builder(
    student: object, *, temperature: float = 4.0, layers: tuple[str, ...] = (), flag: bool = False, needed: int
) -> dict:
    """Build a thing.

    And more.
    """
    return {"student": student, "temperature": temperature, "layers": layers, "flag": flag, "needed": needed}


@pytest.fixture
def registry() -> Registry:
    made = Registry("method", "overproof.nothing")
    made.register("thing", paper="A paper")(builder)
    return made


def test_schema_and_conversion(registry: Registry) -> None:
    entry = registry.get("thing")
    assert entry.summary == "Build a thing."
    assert entry.positional() == ("student",)
    assert {o.name: o.type_name for o in entry.options().values()}["temperature"] == "float"
    made = registry.create("thing", "s", temperature="8/255", flag="true", needed="3", layers=["a"])
    assert made == {"student": "s", "temperature": 8 / 255, "flag": True, "needed": 3, "layers": ("a",)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("thign", {}, "Unknown method 'thign'. Did you mean 'thing'?"),
        ("thing", {"needed": 1, "temprature": 2}, "Did you mean 'temperature'?"),
        ("thing", {}, "needs the option 'needed'"),
        ("thing", {"needed": "many"}, "option 'needed': 'many' is not valid"),
        ("thing", {"needed": 1, "temperature": "1/0"}, "divides by zero"),
    ],
)
def test_refusals(registry: Registry, name: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        registry.create(name, "s", **options)


def test_names_are_not_taken_twice(registry: Registry) -> None:
    registry.add("thing", builder)
    with pytest.raises(UsageError, match="is taken"):
        registry.add("thing", dict)


def test_dataclass_entries_inherit_options() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Base:
        eps: float = 0.1

    @dataclass(frozen=True, kw_only=True)
    class Child(Base):
        steps: int = 3

    registry = Registry("attack", "overproof.nothing")
    registry.add("child", Child)
    assert registry.create("child", eps="1/4", steps=2) == Child(eps=0.25, steps=2)


def test_fraction_is_exact() -> None:
    assert convert("8/255", float, "eps") == 8 / 255
    assert convert("8/255", str, "text") == "8/255"
    assert convert(" 2 / 4 ", float, "eps") == 0.5


def test_plugin_file_registers(tmp_path: Path) -> None:
    from overproof.methods import METHODS

    path = tmp_path / "mine.py"
    path.write_text(
        "from overproof.methods import METHODS\nfrom overproof.methods.ce import CE\n"
        "@METHODS.register('mine-for-a-test')\nclass Mine(CE):\n    'A method of mine.'\n"
    )
    load_plugin(path)
    assert METHODS.get("mine-for-a-test").summary == "A method of mine."
    with pytest.raises(UsageError, match="no such file"):
        load_plugin(tmp_path / "absent.py")
    path.write_text("1/0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        load_plugin(path)


def test_layers_and_overrides_merge_once() -> None:
    config = resolve(
        {"train": {"lr": 0.1, "epochs": 3}}, {"train": {"epochs": 4}}, overrides=["train.lr=0.2", "method.eps=8/255"]
    )
    assert (config.train.lr, config.train.epochs) == (0.2, 4)
    assert config.method.options == {"eps": "8/255"}
    assert resolve(config.table()) == config
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("train.epoch=3", UnknownNameError, "Did you mean 'epochs'"),
        ("trian.lr=3", UnknownNameError, "Did you mean 'train'"),
        ("train.lr=-1", UsageError, "train.lr = -1"),
        ("train.epochs=many", UsageError, "train.epochs = 'many'"),
        ("train.lr", UsageError, "section.key=value"),
        ("evaluation.curve=[-1]", UsageError, "evaluation.curve.0"),
    ],
)
def test_bad_overrides(override: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve({}, overrides=[override])


def test_override_values_are_toml_or_text() -> None:
    assert parse_override("a.b=3") == {"a": {"b": 3}}
    assert parse_override("a=[1, 2]") == {"a": [1, 2]}
    assert parse_override("a=8/255") == {"a": "8/255"}
    assert parse_override("a=cutout:8") == {"a": "cutout:8"}


def test_toml_round_trip(tmp_path: Path) -> None:
    config = RunConfig()
    write_toml(tmp_path / "c.toml", config.table())
    assert resolve(read_toml(tmp_path / "c.toml")) == config


def test_damaged_files_are_named(tmp_path: Path) -> None:
    import numpy as np

    for name, read in (("a.json", read_json), ("a.toml", read_toml), ("a.npz", read_arrays)):
        with pytest.raises(FolderError, match="does not exist"):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(b"\x00{[broken")
        with pytest.raises(FolderError, match=name.replace(".", r"\.")):
            read(tmp_path / name)
    np.savez(tmp_path / "objects.npz", a=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(FolderError, match="plain arrays"):
        read_arrays(tmp_path / "objects.npz")

"""What a module offers is what its `__all__` says."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import carrel
from carrel import abc

NAMES = [
    module.name
    for module in pkgutil.walk_packages(carrel.__path__, "carrel.")
    if not module.name.endswith("__main__") and ".migrations" not in module.name
]
OFFERING = [name for name in NAMES if hasattr(importlib.import_module(name), "__all__")]


def own(module: ModuleType) -> set[str]:
    """The classes and functions a module itself defines and does not hide."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", OFFERING)
def test_all_is_sorted_and_there(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [item for item in module.__all__ if not hasattr(module, item)] == []


@pytest.mark.parametrize("name", ["carrel.abc", "carrel.testing.fakes", "carrel.testing.faulty"])
def test_nothing_public_is_left_out(name: str) -> None:
    module = importlib.import_module(name)
    assert own(module) - set(module.__all__) == set()


@pytest.mark.parametrize(
    ("name", "surface"),
    [
        ("carrel.buses", {"MemoryBus"}),
        ("carrel.runtimes.docker", {"DockerRuntime", "DockerRuntimeOptions"}),
        ("carrel.runtimes.local", {"LocalRuntime", "LocalRuntimeOptions"}),
        ("carrel.store", {"SqliteStore"}),
        ("carrel.testing", {"FakeGateway", "FakeHost", "FakeRuntime", "FakeTurn"}),
        ("carrel.testing.conformance", {"NotConforming", "failures"}),
        ("carrel.workspaces", {"FileEntry", "Folders", "WorkspaceFiles"}),
    ],
)
def test_the_surface_of_a_package(name: str, surface: set[str]) -> None:
    assert surface <= set(importlib.import_module(name).__all__)


def contracts() -> list[type]:
    return [value for name in abc.__all__ if inspect.isclass(value := getattr(abc, name)) and inspect.isabstract(value)]


@pytest.mark.parametrize("contract", contracts())
def test_a_contract_is_small_and_says_what_each_method_does(contract: type) -> None:
    methods = [name for name, value in vars(contract).items() if getattr(value, "__isabstractmethod__", False)]
    assert 1 <= len(methods) <= 9
    assert all(inspect.getdoc(getattr(contract, name)) for name in methods)

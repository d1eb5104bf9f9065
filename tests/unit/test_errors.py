"""The tree of errors: drawn as it is, each with a message, a code and a status of its own."""

import importlib
import inspect
import pkgutil
import re

import pytest

import carrel
from carrel import errors
from carrel.errors import CarrelError, all_errors

# Every class anywhere in the package, as it would be at run time.
for _module in pkgutil.walk_packages(carrel.__path__, "carrel."):
    if not _module.name.endswith("__main__") and ".migrations" not in _module.name:
        importlib.import_module(_module.name)

CLASSES = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, CarrelError)
}


def drawn() -> dict[str, tuple[str | None, int | None]]:
    """Each class of the drawing, with its parent and the status beside it."""
    found: dict[str, tuple[str | None, int | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ((?:[│├└─ ])*)([A-Z]\w+)(?:\s+(\d{3})|\s+\(.*\))?", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        del path[depth:]
        found[match[2]] = (path[-1] if path else None, int(match[3]) if match[3] else None)
        path.append(match[2])
    return found


def test_the_drawing_names_every_error() -> None:
    assert set(drawn()) == set(CLASSES)
    assert len(drawn()) > 30


@pytest.mark.parametrize("name", CLASSES)
def test_the_drawing_is_true(name: str) -> None:
    parent, status = drawn()[name]
    assert parent == (None if name == "CarrelError" else CLASSES[name].__bases__[0].__name__)
    assert status == (CLASSES[name].http_status if CLASSES[name].http_status != 500 else None)


def test_every_error_has_a_code_of_its_own() -> None:
    assert set(all_errors().values()) == set(CLASSES.values())
    assert len({cls.code for cls in CLASSES.values()}) == len(CLASSES)
    for code, cls in all_errors().items():
        assert cls.code == code
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_the_docstring_is_the_default_message(cls: type[CarrelError]) -> None:
    assert cls.__doc__, "a docstring of its own"
    first = inspect.getdoc(cls)
    assert first is not None
    first = first.split("\n", 1)[0]
    assert first.endswith("."), first
    assert CarrelError.__init__ is not cls.__init__ or cls().message == first


def test_what_the_operator_reads_is_kept_from_the_user() -> None:
    error = errors.SandboxLaunchFailed(operator_detail="at /secret/path", attempt=2)
    assert "secret" not in error.message
    assert "secret" in str(error)
    assert error.context == {"attempt": 2}
    assert error.code == "sandbox_launch_failed"


def test_a_message_of_ones_own_takes_the_place_of_the_default() -> None:
    assert errors.Forbidden("No.").message == "No."
    assert errors.QueueFull(7).message.count("7") == 1


def test_when_to_come_again() -> None:
    assert errors.Draining().retry_after_seconds == 5
    assert errors.NotFound().retry_after_seconds is None


def test_a_class_made_elsewhere_gets_a_code_too() -> None:
    # Not a subclass of CarrelError itself: the tree must not grow for the tests that follow.
    assert errors._snake("AgentStartFailed") == "agent_start_failed"

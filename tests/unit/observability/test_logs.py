"""Lines for programs or for readers; libraries' lines too; none with a secret in it."""

import io
import json
import logging

import pytest
import structlog

from carrel.observability import Redactor, configure_logging

SECRET = "sk-ant-api03-AbCdEf0123456789"


@pytest.fixture(autouse=True)
def _as_before():
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(out, **options):
    configure_logging("info", stream=out, redactor=Redactor(["planted-value"]), **options)
    log = structlog.get_logger("test")
    with structlog.contextvars.bound_contextvars(request_id="r1", session_id="s1"):
        log.debug("quiet")
        log.info("hello", key=SECRET, more={"a": ["planted-value"]})
        try:
            raise ValueError(f"it was {SECRET}")
        except ValueError:
            log.exception("failed")
    logging.getLogger("some.library").warning("GET /?ticket=%s", SECRET)
    return out.getvalue()


def test_json_lines_carry_their_ids_and_no_secret():
    text = write(io.StringIO(), form="json")
    hello, failed, library = [json.loads(line) for line in text.splitlines()]
    assert hello["event"] == "hello"
    assert hello["level"] == "info"
    assert (hello["request_id"], hello["session_id"]) == ("r1", "s1")
    assert hello["timestamp"].endswith("Z")
    assert "ValueError: it was [redacted]" in failed["exception"]
    assert library["logger"] == "some.library"
    assert library["event"] == "GET /?ticket=[redacted]"
    assert SECRET not in text
    assert "planted-value" not in text


@pytest.mark.parametrize(("out", "form"), [(Terminal, "auto"), (io.StringIO, "console")])
def test_lines_for_a_reader_have_no_secret_either(out, form):
    text = write(out(), form=form)
    assert "hello" in text
    assert not text.lstrip().startswith("{")
    assert SECRET not in text
    assert "planted-value" not in text
    assert "it was [redacted]" in text


def test_auto_is_json_where_nobody_reads():
    assert all(json.loads(line) for line in write(io.StringIO(), form="auto").splitlines())

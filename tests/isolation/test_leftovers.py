"""Every process of a sandbox bears its mark, and nothing of it is left when it ends."""

import os

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def test_every_process_bears_its_sandboxes_mark(found):
    assert found.host["marked"] >= 3
    if os.geteuid() == 0:  # others may not look into a runner
        assert found.host["unmarked"] == []
    assert found.host["mark of the parent"] is None


def test_a_hundred_stragglers_end_with_their_session(found):
    assert found.host["leftovers"] > 100
    assert found.host["left of the stopped"] == []
    assert found.host["seconds to end"] < 10


def test_nothing_is_left_of_a_server_that_has_ended(found):
    assert found.host["exit"] == 0
    for kind in ("processes", "sandboxes", "sockets", "mounts", "cgroups", "folders"):
        assert found.host[f"left {kind}"] == [], kind

"""The model's key and the link's tokens are nowhere in a sandbox, nor where another user of the host could see them."""

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def test_no_secret_in_the_files_of_a_sandbox(found):
    found.refused("secrets_in_files")


def test_no_secret_in_the_processes_of_a_sandbox_as_seen_from_inside(found):
    found.refused("secrets_in_processes")


def test_no_secret_in_the_memory_of_a_sandbox_as_seen_from_outside(found):
    memories = found.host["memories"]
    assert {tuple(secret) for secret, _ in memories["inside"] + memories["wall"]} == {()}
    assert sum(size for _, size in memories["inside"]) > 50_000_000


@pytest.mark.requires("root")
def test_a_runner_knows_its_own_link_token_and_no_key_of_the_model(found):
    """That the search finds what is there, too."""
    known, _ = found.host["memories"]["runner"][0]
    assert "own link token" in known
    assert not {"model key", "admin key"} & set(known)
    assert found.host["nursery memory"] == []


@pytest.mark.requires("root")
def test_a_runners_own_user_does_not_look_into_it(found):
    for seen in found.host["runner memory, by its own user"]:
        assert "PermissionError" in seen


def test_no_secret_in_any_argument_list(found):
    assert found.host["processes looked at"] > 5
    assert found.host["secrets in arguments"] == []


def test_no_secret_in_any_environment(found):
    """But for an agent's own token in its own."""
    assert found.host["secrets in environments"] == []


def test_no_secret_in_logs_database_or_workspaces(found):
    looked_at = set(found.host["files looked at"])
    assert {"carrel.db", "stderr", "nursery.log", "found.json"} <= looked_at
    assert found.host["secrets in files"] == []
    assert found.host["database was read"]


def test_no_secret_in_the_event_log(found):
    assert found.host["events looked at"] > 1000
    assert found.host["secrets in events"] == []

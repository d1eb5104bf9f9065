"""Network `gateway-only`: a Bash tool reaches the gateway's allowed paths and nothing else."""

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

ALLOWED = ("/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens", "/v1/models")


def test_there_is_no_network(found):
    found.refused("interfaces")
    found.refused("loopback")
    found.refused("addresses")
    found.refused("datagrams")


def test_there_are_no_names(found):
    found.refused("names")


def test_sockets_that_no_network_namespace_holds_are_refused(found):
    found.refused("other_sockets")


def test_there_is_no_other_unix_socket(found):
    found.refused("abstract_sockets")
    found.refused("socket_files")


def test_nobody_came_to_the_hosts_listener(found):
    assert found.host["visitors"] == []


def test_the_gateway_has_no_other_path(found):
    answers = {
        name: status for name, (status, _) in found.probe["gateway_answers"].items() if name[:4] in ("GET ", "POST")
    }
    assert len(answers) > 60
    wrong = {name: status for name, status in answers.items() if status not in ("404", "400", "405", "307")}
    assert not wrong


def test_the_gateway_has_no_other_method(found):
    answers = found.probe["gateway_answers"]
    statuses = {method: answers[f"{method} /v1/messages"][0] for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")}
    assert set(statuses.values()) <= {"404", "405"}
    assert answers["TRACE /v1/messages"][0] in ("400", "404", "405")
    assert answers["BREW /v1/messages"][0] in ("400", "404", "405")


def test_the_gateway_wants_a_token_of_a_running_sandbox(found):
    answers = found.probe["gateway_answers"]
    for name in ("no token", "wrong token", "wrong bearer", "no token, message"):
        assert answers[name][0] == "401", name
    assert answers["pipelined"][0] == "200,404,401"


def test_a_request_does_not_choose_where_it_goes(found):
    answers = found.probe["gateway_answers"]
    statuses = {name: answers[name][0] for name in ("absolute", "other host", "forwarded", "rewritten", "query")}
    assert set(statuses.values()) == {"200"}, statuses
    assert answers["absolute with path"][0] == "404"
    for name in ("connect", "upgrade elsewhere", "http2"):
        assert answers[name][0] in ("400", "403", "404", "405", "closed"), name
    assert "101" not in answers["upgrade"][0]
    paths = {path.partition("?")[0] for _, path, _ in found.upstream}
    assert paths <= {"/v1/messages", "/v1/messages/count_tokens", "/v1/models"}, paths
    assert {method for method, path, _ in found.upstream if path.startswith("/v1/models")} == {"GET"}
    assert {method for method, path, _ in found.upstream if path.startswith("/v1/messages")} == {"POST"}


def test_the_upstream_gets_the_real_key_and_no_header_it_might_obey(found):
    assert len(found.upstream) > 5
    for method, path, headers in found.upstream:
        where = f"{method} {path}"
        assert headers["x-api-key"] == found.model_key, where
        assert not any(token in f"{headers}" for token in found.agent_tokens), where
        assert not {"authorization", "x-forwarded-host", "forwarded", "x-original-url", "x-http-method-override"} & set(
            headers
        ), where
        assert headers["host"].startswith("127.0.0.1:"), where


def test_answers_do_not_hold_the_key(found):
    assert found.model_key not in str(found.probe)

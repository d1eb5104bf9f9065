"""What a request is called in the audit log and in metrics: stable words, whatever its path holds."""

import asyncio

from carrel.api.dialects import DIALECTS, DialectAuth, DialectOptions, create_dialect, mount
from carrel.api.operations import Operations

CHANGES = {
    ("POST", "/api/v1/sessions"): "session.create",
    ("PATCH", "/api/v1/sessions/{session_id}"): "session.update",
    ("DELETE", "/api/v1/sessions/{session_id}"): "session.delete",
    ("POST", "/api/v1/sessions/{session_id}/stop"): "session.stop",
    ("POST", "/api/v1/sessions/{session_id}/resume"): "session.resume",
    ("POST", "/api/v1/sessions/{session_id}/interrupt"): "session.interrupt",
    ("POST", "/api/v1/sessions/{session_id}/fork"): "session.fork",
    ("POST", "/api/v1/sessions/{session_id}/turns"): "turn.create",
    ("POST", "/api/v1/sessions/{session_id}/turns/{turn_id}/cancel"): "turn.cancel",
    ("PUT", "/api/v1/sessions/{session_id}/files/{path:path}"): "file.write",
    ("DELETE", "/api/v1/sessions/{session_id}/files/{path:path}"): "file.delete",
    ("PUT", "/api/v1/sessions/{session_id}/archive"): "archive.upload",
    ("POST", "/api/v1/query"): "query.run",
}


DIALECTS_CHANGES = {
    ("POST", "/compat/claude-agent-http/api/v1/sessions"): "session.create",
    ("DELETE", "/compat/claude-agent-http/api/v1/sessions/{session_id}"): "session.delete",
    ("POST", "/compat/claude-agent-http/api/v1/sessions/{session_id}/resume"): "session.resume",
    ("POST", "/compat/claude-agent-http/api/v1/chat"): "turn.create",
    ("POST", "/compat/claude-agent-http/api/v1/chat/stream"): "turn.create",
    ("POST", "/compat/claudecode-api/api/containers/{environment_id}/start"): "environment.start",
    ("POST", "/compat/claudecode-api/api/containers/{environment_id}/stop"): "environment.stop",
    ("POST", "/compat/claudecode-api/api/execute"): "turn.create",
    ("POST", "/compat/claudecode-api/api/sessions"): "session.create",
    ("DELETE", "/compat/claudecode-api/api/sessions/{environment_id}/{session_id}"): "session.delete",
    ("POST", "/compat/sdk-server/query"): "query.run",
    ("POST", "/compat/sdk-server/session/start"): "session.create",
    ("POST", "/compat/sdk-server/session/{session_id}/query"): "turn.create",
    ("POST", "/compat/sdk-server/session/{session_id}/interrupt"): "session.interrupt",
    ("DELETE", "/compat/sdk-server/session/{session_id}"): "session.delete",
}


async def test_every_change_has_a_word_of_its_own(build):
    found = {(op.method, op.template): op.action for op in Operations((await build()).app) if op.changes}
    assert CHANGES.items() <= found.items()
    assert len(set(found.values())) == len(found)
    for action in found.values():
        assert all(action.partition(".")), action


async def test_a_request_is_found_before_it_is_routed(build):
    operations = Operations((await build()).app)

    def find(method, path, kind="http"):
        return operations.find({"type": kind, "method": method, "path": path})

    operation, values = find("PUT", "/api/v1/sessions/s1/files/a/b.txt")
    assert operation is not None
    assert operation.object_of(values) == ("file", "a/b.txt")
    assert values["session_id"] == "s1"
    operation, values = find("POST", "/api/v1/sessions/s1/turns")
    assert operation is not None
    assert operation.object_of(values) == ("turn", None)
    operation, values = find("GET", "/api/v1/sessions/s1/events")
    assert operation is not None
    assert operation.object_of(values) == ("session", "s1")
    operation, _ = find("", "/api/v1/sessions/s1/stream", kind="websocket")
    assert operation is not None
    assert (operation.method, operation.action) == ("WEBSOCKET", "session.stream")
    operation, _ = find("DELETE", "/api/v1/sessions")
    assert operation is not None
    assert (operation.template, operation.action) == ("/api/v1/sessions", "request.refused")
    assert find("GET", "/api/v2/secrets") == (None, {})


async def test_dialects_do_the_same_things_under_the_same_words(build, tmp_path):
    called = await build()
    operations = Operations(called.app)
    auth = DialectAuth("keys", called.services.authenticator.authenticate)
    for name in DIALECTS:
        options = DialectOptions(auth=auth, users_dir=tmp_path)
        dialect = await asyncio.to_thread(create_dialect, name, called.services, options)
        mount(called.app, name, dialect)
    found = {(op.method, op.template): op.action for op in operations if op.changes and op.dialect is not None}
    assert found == DIALECTS_CHANGES
    native = {op.action for op in operations if op.dialect is None}
    assert set(found.values()) <= native

    def find(method, path):
        return operations.find({"type": "http", "method": method, "path": f"/compat/sdk-server{path}"})

    operation, values = find("DELETE", "/session/s1")
    assert operation is not None
    assert (operation.dialect, operation.object_of(values)) == ("sdk-server", ("session", "s1"))
    operation, _ = find("PUT", "/session/s1")
    assert operation is not None
    assert (operation.dialect, operation.action) == ("sdk-server", "request.refused")
    assert find("GET", "/secrets") == (None, {})

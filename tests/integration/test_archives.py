"""Workspaces as archives, up and down, over a real server and the real agent."""

import io
import tarfile
import zipfile

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def tar(files, form="gz", **links):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{form}") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(info, io.BytesIO(content))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


async def put(api, session, content, expected=200, **params):
    return await api.ask("PUT", f"/sessions/{session}/archive", expected, content=content, params=params)


async def test_an_archive_goes_up_the_agent_works_in_it_and_it_comes_down(api):
    session = await api.session()
    sent = tar({"src/run.sh": b"#!/bin/sh\necho ran\n", "a b.txt": b"one"}, link="a b.txt")
    assert await put(api, session, sent) == {"members": 3, "bytes": 22, "links_left_out": 0}
    unpacked = await api.until_event(session, "workspace.unpacked")
    assert unpacked["data"] == {"path": "", "members": 3, "bytes": 22}
    result = await api.run(session, "[[bash: cat link && ./src/run.sh && echo two >> src/new && id -u > uid]]")
    assert result["tool_calls"][0]["result"] == "oneran", result
    assert await put(api, session, zipped({"z": b"zip"}), path="deep/er") == {
        "members": 1,
        "bytes": 3,
        "links_left_out": 0,
    }
    for form, media_type, mode in (
        ("tar.gz", "application/gzip", "r:gz"),
        ("tar", "application/x-tar", "r:"),
        (None, "application/zip", None),
        ("tar.zst", "application/zstd", None),
    ):
        params, headers = ({"format": form}, {}) if form else ({}, {"Accept": media_type})
        got = await api.http.get(f"/sessions/{session}/archive", params=params, headers=headers)
        assert (got.status_code, got.headers["content-type"]) == (200, media_type)
        content = got.content
        if form == "tar.zst":
            assert content.startswith(b"\x28\xb5\x2f\xfd")
        elif mode is None:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert archive.read("src/new") == b"two\n"
        else:
            with tarfile.open(fileobj=io.BytesIO(content), mode=mode) as archive:
                members = {each.name: each for each in archive}
                assert {"src/run.sh", "src/new", "a b.txt", "link", "deep/er/z"} <= set(members)
                assert members["link"].linkname == "a b.txt"
                assert members["src/run.sh"].mode & 0o777 == 0o755
        other = await api.session()
        await put(api, other, content)
        assert (await api.http.get(f"/sessions/{other}/files/src/new")).text == "two\n"
    part = await api.http.get(f"/sessions/{session}/archive", params={"path": "deep", "format": "tar"})
    with tarfile.open(fileobj=io.BytesIO(part.content)) as archive:
        assert [each.name for each in archive if each.isfile()] == ["deep/er/z"]
    await api.ask("GET", f"/sessions/{session}/archive", 404, params={"path": "none"})
    kept = await api.until("the archive is kept", lambda: kept_for_upload(api, other))
    assert kept["reason"] == "upload"


async def kept_for_upload(api, session):
    return next(iter((await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]), None)


async def test_what_may_not_be_unpacked_is_refused_and_nothing_comes_out_of_the_workspace(start):
    api = await start(max_archive_bytes=2**20, max_file_bytes=2**19)
    session = await api.session()
    for content, status, code in (
        (b"", 400, "archive_invalid"),
        (b"no archive at all", 400, "archive_invalid"),
        (tar({"../out": b"x"}), 400, "archive_invalid"),
        (tar({"/etc/out": b"x"}), 400, "archive_invalid"),
        (tar({}, out="/etc/passwd"), 400, "archive_invalid"),
        (tar({"big": bytes(2**20 + 1)}), 413, "archive_too_large"),
        (b"x" * (2**19 + 1), 413, "file_too_large"),
    ):
        assert (await put(api, session, content, status))["code"] == code
    await put(api, session, tar({"a": b"x"}), 400, path="../..")
    await put(api, session, tar({"a": b"x"}), 422, links="follow")
    assert (await put(api, session, tar({"a": b"x"}, out="/etc"), links="leave-out"))["links_left_out"] == 1
    assert not [each for each in await api.events(session) if each["type"] == "workspace.unpacked"][1:]


async def test_an_archive_waits_for_no_turn_and_a_quota_holds(api):
    session = await api.session(workspace={"type": "persistent", "name": "shop"})
    turn = await api.send(session, "[[bash: sleep 30]]")
    await api.until_status(session, "running")
    refused = await put(api, session, tar({"a": b"x"}), 409)
    assert refused["code"] == "turn_at_work"
    await api.ask("POST", f"/sessions/{session}/interrupt")
    await api.until_event(session, "turn.completed", turn)
    workspace = (await api.ask("GET", "/workspaces"))["data"][0]["id"]
    await api.ask("PATCH", f"/workspaces/{workspace}", json={"quota_mb": 1})
    assert (await put(api, session, tar({"big": bytes(2**20 + 1)}), 409))["code"] == "workspace_over_quota"
    await put(api, session, tar({"small": b"x"}))
    assert (await api.run(session, "[[bash: cat small]]"))["tool_calls"][0]["result"] == "x"

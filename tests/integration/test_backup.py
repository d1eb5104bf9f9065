"""A backup is made while a turn runs; restored elsewhere, the conversation goes on."""

import asyncio
import sys

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.timeout(180)]


async def carrel(*arguments: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/env",
        *[f"{name}={value}" for name, value in environment.items()],
        sys.executable,
        "-m",
        "carrel",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.on_both_engines
async def test_a_conversation_goes_on_from_a_backup(start, engine, tmp_path, request):
    api = await start()
    session = await api.session()
    await api.run(session, "[[write: notes.txt | remembered]] [[bash: ln -s /etc/passwd out]]")
    turn = await api.send(session, "[[bash: echo begun > begun.txt]] [[count: 400 @20]]")
    await api.until_event(session, "tool.finished", turn)
    archive = tmp_path / "backup.tar.gz"
    environment = {"CARREL_DATABASE__URL": engine["database"]["url"]} if engine else {}
    told = await carrel("backup", str(archive), "--data", str(tmp_path / "data"), **environment)
    assert "is written" in told
    running = await api.ask("GET", f"/sessions/{session}/turns/{turn}")
    assert running["status"] == "running", "the turn ran while the backup was made"

    restored = {"data": tmp_path / "restored"}
    named = []
    if engine:
        restored["database"] = {"url": await asyncio.to_thread(request.getfixturevalue("postgres"))}
        named = ["--database-url", restored["database"]["url"]]
    await carrel("restore", str(archive), "--data", str(tmp_path / "restored"), *named)

    again = await start(**restored)
    lost = await again.until_event(session, "turn.completed", turn)
    assert (lost["data"]["status"], lost["data"]["stop_reason"]) == ("failed", "sandbox_lost")
    result = await again.run(session, "[[bash: cat notes.txt begun.txt; readlink out]]")
    assert result["tool_calls"][0]["result"].split() == ["rememberedbegun", "/etc/passwd"]
    remembered = (await again.run(session, "do you remember?"))["text"]
    assert "turn 4" in remembered, remembered
    events = await again.events(session)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    # The first server still has its turn: nothing of it was taken away.
    ended = await api.until_event(session, "turn.completed", turn)
    assert ended["data"]["status"] == "succeeded"

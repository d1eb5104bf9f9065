"""Many at once, and what is left of them."""

import asyncio
import gc
import os

import psutil
import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.timeout(300)]

# What 200 sessions and 20 agents may leave in a process that is server and client at once. Descriptors: both ends of
# connections that are kept alive, the client's (20) and those to the model (20, of 20 agents), and the database's.
# Memory: the allocator's own, measured at 10 to 25 MB.
MORE_DESCRIPTORS = 100
MORE_MEMORY_BYTES = 60 * 2**20


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def processes() -> int:
    return len(psutil.Process().children(recursive=True))


@pytest.mark.blocks_loop("20 agents on two cores leave the test's own process waiting")
async def test_200_sessions_at_once_20_at_work_and_nothing_left_of_them(api):
    await api.run(await api.session(), "warm everything up")
    await api.ask("DELETE", f"/sessions/{(await api.ask('GET', '/sessions'))['data'][0]['id']}", 204)
    gc.collect()
    before = (descriptors(), processes(), len(asyncio.all_tasks()), psutil.Process().memory_info().rss)
    sessions = await asyncio.gather(*(api.session(title=str(i)) for i in range(200)))
    assert len(set(sessions)) == 200
    listed = await api.ask("GET", "/sessions", params={"limit": 1000})
    assert len(listed["data"]) == 200
    results = await asyncio.gather(
        *(api.run(session, f"[[bash: echo {i} > mine.txt; cat mine.txt]]") for i, session in enumerate(sessions[:20]))
    )
    assert [result["status"] for result in results] == ["succeeded"] * 20
    assert [result["tool_calls"][0]["result"] for result in results] == [str(i) for i in range(20)]
    await asyncio.gather(*(api.ask("DELETE", f"/sessions/{session}", 204) for session in sessions))
    assert (await api.ask("GET", "/sessions"))["data"] == []
    assert not [path for path in (api.server.data / "sandboxes").iterdir() if path.is_dir()]
    assert not list((api.server.data / "sessions").iterdir())

    async def settled():
        gc.collect()
        return processes() <= before[1] and len(asyncio.all_tasks()) <= before[2] + 2

    await api.until("processes and tasks are gone", settled, 20)
    after = (descriptors(), processes(), len(asyncio.all_tasks()))
    print(f"descriptors, processes, tasks: {before[:3]} before, {after} after")
    assert after[0] <= before[0] + MORE_DESCRIPTORS, (before, after)
    grown = psutil.Process().memory_info().rss - before[3]
    print(f"memory grew by {grown / 2**20:.1f} MB")
    assert grown < MORE_MEMORY_BYTES


async def test_a_subscriber_that_stops_reading_holds_nobody_up_and_misses_nothing(start):
    api = await start(stream_buffer_bytes=200_000)
    session = await api.session()
    host, port = api.server.url.removeprefix("http://").split(":")
    # Raw, so that nothing reads ahead: the kernel's buffers and the server's bound are all that holds the rest.
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
    writer.write(
        f"GET /api/v1/sessions/{session}/events?deltas=true HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Authorization: Bearer {api.server.key}\r\nAccept: text/event-stream\r\n\r\n".encode()
    )
    await writer.drain()
    for i in range(6):
        # 3 MB of events and as much of deltas each time, far more than is buffered.
        result = await asyncio.wait_for(api.run(session, f"[[repeat: {i}abcdefghi | 3000000]]"), 60)
        assert result["status"] == "succeeded"
    stored = await api.events(session)
    received = b""
    async with asyncio.timeout(60):
        while f"id: {stored[-1]['seq']}\n".encode() not in received[-200_000:]:
            received += await reader.read(2**20)
    writer.close()
    numbers = [int(line[4:]) for line in received.split(b"\n") if line.startswith(b"id: ")]
    assert numbers == [event["seq"] for event in stored]

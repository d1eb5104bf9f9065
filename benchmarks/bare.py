"""The bare Agent SDK in a process of its own: what Carrel is measured against.

`python -m benchmarks.bare OPTIONS` (JSON: cli, cwd, env) takes a command a line and answers each with a line of JSON.
No wall, no gateway, no store; the same CLI with the same options and environment.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import claude_agent_sdk as sdk

Json = dict[str, Any]


class Worker:
    """One client after the other, or several at once."""

    def __init__(self, options: Json) -> None:
        self._options = options
        self._clients: list[sdk.ClaudeSDKClient] = []

    async def obey(self, command: Json) -> Json:
        """Do what a command says."""
        match command["do"]:
            case "connect":
                return await self._connect(command.get("resume"))
            case "query":
                return await self._query(command["prompt"])
            case "cold":
                begun = await self._connect(command.get("resume"))
                return {**await self._query(command["prompt"]), **begun}
            case "disconnect":
                while self._clients:
                    await self._clients.pop().disconnect()
                return {}
        raise ValueError(command["do"])

    async def _connect(self, resume: str | None) -> Json:
        sent = time.time()
        client = sdk.ClaudeSDKClient(
            sdk.ClaudeAgentOptions(
                cli_path=self._options["cli"],
                cwd=self._options["cwd"],
                env=self._options["env"],
                system_prompt={"type": "preset", "preset": "claude_code"},
                permission_mode="bypassPermissions",
                include_partial_messages=True,
                max_buffer_size=64 * 2**20,
                resume=resume,
            )
        )
        await client.connect()
        self._clients.append(client)
        return {"sent": sent, "connected": time.time()}

    async def _query(self, prompt: str) -> Json:
        client = self._clients[-1]
        told: Json = {"sent": time.time(), "first": None, "pieces": 0}
        await client.query(prompt)
        async for message in client.receive_response():
            if isinstance(message, sdk.StreamEvent):
                if message.event.get("type") == "content_block_delta":
                    told["last"] = time.time()
                    told["first"] = told["first"] or told["last"]
                    told["pieces"] += 1
            elif isinstance(message, sdk.ResultMessage):
                told["session"] = message.session_id
                if message.is_error:
                    raise RuntimeError(f"the turn failed: {message.result}")
        told["done"] = time.time()
        return told


async def _lines(stack: AsyncExitStack) -> AsyncIterator[bytes]:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    stack.callback(transport.close)
    while line := await reader.readline():
        yield line


async def main(options: Json) -> None:
    """Serve standard input to its end."""
    worker = Worker(options)
    async with AsyncExitStack() as stack:
        print(json.dumps({"ready": True}), flush=True)
        async for line in _lines(stack):
            print(json.dumps(await worker.obey(json.loads(line))), flush=True)
        await worker.obey({"do": "disconnect"})


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))

"""Claude Code driven from Python in the sandbox image alone, without a gateway.

docker run --rm --init -e CLAUDE_CODE_OAUTH_TOKEN -v "$PWD/examples:/examples:ro" carrel-sandbox python3 /examples/agent.py
"""

import asyncio
import sys

from claude_agent_sdk import AssistantMessage, ClaudeAgentOptions, ResultMessage, TextBlock, query


async def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Write hello.txt, then say what is in this folder."
    options = ClaudeAgentOptions(cwd="/workspace", permission_mode="bypassPermissions")
    async for message in query(prompt=prompt, options=options):
        if isinstance(message, AssistantMessage):
            for block in message.content:
                if isinstance(block, TextBlock):
                    print(block.text)
        elif isinstance(message, ResultMessage):
            print(f"{message.subtype} after {message.num_turns} turns")


asyncio.run(main())

"""The real Claude Code CLI, bare, against the scripted model: every kind of step has to make sense to it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    Message,
    ResultMessage,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)

from carrel.model_gateway.scripted import create_app

pytestmark = pytest.mark.cli

OptionsFactory = Callable[..., ClaudeAgentOptions]


@pytest.fixture
async def url() -> AsyncIterator[str]:
    config = uvicorn.Config(create_app(), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(), name="scripted model")
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await serving


@pytest.fixture
def options(url: str, tmp_path: Path) -> OptionsFactory:
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    home.mkdir()
    workspace.mkdir()

    def make(**more: Any) -> ClaudeAgentOptions:
        env = {
            "HOME": str(home),
            "CLAUDE_CONFIG_DIR": str(home / ".claude"),
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "sk-nothing",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_AUTOUPDATER": "1",
            "IS_SANDBOX": "1",
        }
        return ClaudeAgentOptions(
            env=env, cwd=workspace, permission_mode="bypassPermissions", setting_sources=[], **more
        )

    return make


@pytest.fixture
async def agent(options: OptionsFactory) -> AsyncIterator[ClaudeSDKClient]:
    async with ClaudeSDKClient(options()) as agent:
        yield agent


async def turn(agent: ClaudeSDKClient, prompt: str) -> list[Message]:
    await agent.query(prompt)
    async with asyncio.timeout(30):
        return [message async for message in agent.receive_response()]


def result(messages: list[Message]) -> str | None:
    last = messages[-1]
    assert isinstance(last, ResultMessage)
    assert not last.is_error
    return last.result


def blocks(messages: list[Message], kind: type) -> list[Any]:
    talk = [m for m in messages if isinstance(m, AssistantMessage | UserMessage) and isinstance(m.content, list)]
    return [block for message in talk for block in message.content if isinstance(block, kind)]


def texts(messages: list[Message]) -> list[str]:
    return [block.text for block in blocks(messages, TextBlock)]


async def test_turns_are_counted_and_quoted(agent: ClaudeSDKClient) -> None:
    assert result(await turn(agent, "hello")) == 'This is turn 1 of our conversation. You said: "hello"'
    assert result(await turn(agent, "[[bash: echo x]]")) == "Result: x"
    assert result(await turn(agent, "again")) == 'This is turn 3 of our conversation. You said: "again"'


async def test_a_command_runs_and_all_of_unicode_comes_through(agent: ClaudeSDKClient) -> None:
    messages = await turn(agent, "[[bash: if [[ ! -f x ]]; then echo 'é \"😀\"'; fi]] [[say: done: ñ [x] 👩‍👩‍👧]]")
    assert texts(messages) == ["done: ñ [x] 👩‍👩‍👧", 'Result: é "😀"']


async def test_a_file_is_written_where_the_agent_works_and_read(agent: ClaudeSDKClient, tmp_path: Path) -> None:
    messages = await turn(agent, r"[[write: sub/a.txt | one\ntwo]] [[read: sub/a.txt]]")
    assert (tmp_path / "workspace/sub/a.txt").read_text() == "one\ntwo"
    assert [block.name for block in blocks(messages, ToolUseBlock)] == ["Write", "Read"]
    assert "one" in (result(messages) or "")


async def test_thinking_is_taken(agent: ClaudeSDKClient) -> None:
    messages = await turn(agent, "[[think: let me see]] [[bash: echo x]] [[think: well]] [[say: done]]")
    assert [block.thinking for block in blocks(messages, ThinkingBlock)] == ["let me see", "well"]
    assert result(messages) == "Result: x"


async def test_an_overloaded_model_is_tried_again(agent: ClaudeSDKClient) -> None:
    messages = await turn(agent, "[[error: 529 x2]] [[say: through]]")
    retries = [m.data for m in messages if isinstance(m, SystemMessage) and m.subtype == "api_retry"]
    assert [retry["error_status"] for retry in retries] == [529, 529]
    assert texts(messages) == ["through"]


@pytest.mark.parametrize("prompt", ["[[drop]] [[bash: echo x]]", "[[say: a]] [[drop]] [[bash: echo x]]"])
async def test_a_dropped_stream_is_asked_for_again(agent: ClaudeSDKClient, prompt: str) -> None:
    messages = await turn(agent, prompt)
    assert any(isinstance(m, SystemMessage) and m.subtype == "api_retry" for m in messages)
    assert result(messages) == "Result: x"
    assert len(blocks(messages, ToolUseBlock)) == 1


@pytest.mark.parametrize("fault", ["error: 529", "malformed"])
async def test_an_answer_that_breaks_off_after_a_block_goes_on(agent: ClaudeSDKClient, fault: str) -> None:
    messages = await turn(agent, f"[[say: first]] [[wait: 0.2]] [[{fault}]] [[say: second]]")
    answers = [
        b.text for m in messages if isinstance(m, AssistantMessage) for b in m.content if isinstance(b, TextBlock)
    ]
    assert answers == ["first", "second"]
    assert result(await turn(agent, "and now")) == 'This is turn 2 of our conversation. You said: "and now"'


async def test_parallel_commands_run_in_one_message(agent: ClaudeSDKClient) -> None:
    messages = await turn(agent, "[[bash: echo c]] [[parallel: echo a | echo b]]")
    calls = [m for m in messages if isinstance(m, AssistantMessage) and blocks([m], ToolUseBlock)]
    assert len(calls) == 3
    assert calls[0].message_id != calls[1].message_id == calls[2].message_id
    assert {block.content for block in blocks(messages, ToolResultBlock)} == {"a", "b", "c"}
    assert result(messages) == "Result: a\nResult: b"  # in the order of the calls, whichever was ready first


async def test_a_sub_agent_follows_the_steps_of_its_own_prompt(agent: ClaudeSDKClient) -> None:
    messages = await turn(
        agent,
        '[[tool: Agent | {"subagent_type": "general-purpose", "description": "d", "run_in_background": false,'
        ' "prompt": "[[bash: echo from below]]"}]]',
    )
    assert "from below" in (result(messages) or "")


async def test_a_structured_answer(options: OptionsFactory) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    async with ClaudeSDKClient(options(output_format={"type": "json_schema", "schema": schema})) as agent:
        messages = await turn(agent, '[[tool: StructuredOutput | {"n": 3}]]')
    assert isinstance(messages[-1], ResultMessage)
    assert messages[-1].structured_output == {"n": 3}


async def test_an_interrupted_turn_is_over_and_counted(agent: ClaudeSDKClient) -> None:
    await agent.query("[[say: begun]] [[wait: 60]] [[say: never]]")
    async with asyncio.timeout(30):
        async for message in agent.receive_response():
            if isinstance(message, AssistantMessage):
                await agent.interrupt()
    assert result(await turn(agent, "next")) == 'This is turn 2 of our conversation. You said: "next"'

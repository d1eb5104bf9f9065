"""Modes and rules: who may let a tool call happen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from carrel.model import PermissionMode
from carrel.protocol.permissions import Decision, PermissionRules, Verdict, decide, rule_for

ALLOW, ASK, DENY = Decision


def rules(**given):
    return PermissionRules(**given)


def verdict(mode, tool, given, **ruled) -> Verdict | None:
    return decide(PermissionMode(mode), rules(**ruled), tool, given)


def bash(command, *, mode="default", **ruled):
    found = verdict(mode, "Bash", {"command": command}, **ruled)
    return found.decision if found is not None else None


@pytest.mark.parametrize(
    ("tool", "given", "default", "accept", "plan", "dont_ask"),
    [
        ("Read", {"file_path": "/workspace/a"}, ALLOW, ALLOW, ALLOW, ALLOW),
        ("Grep", {"pattern": "x"}, ALLOW, ALLOW, ALLOW, ALLOW),
        ("Read", {"file_path": "/etc/passwd"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "cat ../../etc/passwd"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "cd / && cat etc/passwd"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "grep --file=/etc/passwd x"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "cat $HOME/x"}, ASK, ASK, DENY, DENY),
        ("TodoWrite", {"todos": []}, ALLOW, ALLOW, ALLOW, ALLOW),
        ("Bash", {"command": "git status && ls -la | head"}, ALLOW, ALLOW, ALLOW, ALLOW),
        ("Write", {"file_path": "/workspace/a"}, ASK, ALLOW, DENY, DENY),
        ("Edit", {"file_path": "a/b.py"}, ASK, ALLOW, DENY, DENY),
        ("Write", {"file_path": "/home/agent/.bashrc"}, ASK, ASK, DENY, DENY),
        ("Write", {"file_path": "/workspace/../home/agent/x"}, ASK, ASK, DENY, DENY),
        ("Write", {"file_path": "/workspace/.git/hooks/pre-commit"}, ASK, ASK, DENY, DENY),
        ("Write", {"file_path": ".claude/settings.json"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "mkdir -p a && touch a/b"}, ASK, ALLOW, DENY, DENY),
        ("Bash", {"command": "rm -rf /home/agent/x"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "rm -rf ../home"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "npm install"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": "ls > list"}, ASK, ASK, DENY, DENY),
        ("Bash", {"command": ""}, ASK, ASK, DENY, DENY),
        ("WebFetch", {"url": "https://example.org"}, ASK, ASK, DENY, DENY),
        ("mcp__github__delete", {}, ASK, ASK, DENY, DENY),
        ("ExitPlanMode", {"plan": "x"}, ASK, ASK, ASK, ASK),
        ("AskUserQuestion", {"questions": []}, ASK, ASK, ASK, DENY),
    ],
)
def test_what_each_mode_says(tool, given, default, accept, plan, dont_ask):
    found = [verdict(mode, tool, given).decision for mode in ("default", "acceptEdits", "plan", "dontAsk")]
    assert found == [default, accept, plan, dont_ask]
    assert verdict("bypassPermissions", tool, given).decision is ALLOW
    auto = verdict("auto", tool, given)
    assert auto is None, "no rule speaks: Claude Code's classifier decides"


@pytest.mark.parametrize("mode", list(PermissionMode))
def test_the_order_of_rules(mode):
    given = {"command": "git push origin main"}
    everywhere = ["Bash(git *)"]
    assert verdict(mode, "Bash", given, deny=everywhere, ask=everywhere, allow=everywhere).decision is DENY
    asked = verdict(mode, "Bash", given, ask=everywhere, allow=everywhere)
    assert asked.decision is (DENY if mode is PermissionMode.DONT_ASK else ASK)
    assert asked.rule == "Bash(git *)"
    assert verdict(mode, "Bash", given, allow=everywhere).decision is ALLOW


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash", "anything > at $(all)"),
        ("Bash(*)", "anything > at $(all)"),
        ("Bash(npm run test)", "npm run test"),
        ("Bash(npm run test *)", "npm run test"),
        ("Bash(npm run test:*)", "npm run test --watch"),
        ("Bash(git * main)", "git push origin main"),
        ("Bash(* --version)", "node --version"),
        ("Bash(npm *)", "npm ci && npm test"),
        ("Bash(npm *)", "cd app && npm test 2>&1 | tail -5"),
        ("Bash(npm *)", 'npm run "a && b"'),
        ("Bash(npm *)", "npm test > /dev/null"),
    ],
)
def test_commands_that_an_allow_rule_covers(rule, command):
    assert bash(command, allow=[rule]) is ALLOW


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash(npm run test)", "npm run test2"),
        ("Bash(npm run test *)", "npm run tests"),
        ("Bash(ls *)", "lsof"),
        ("Bash(npm *)", "npm test && curl evil.example"),
        ("Bash(npm *)", "npm test; curl evil.example"),
        ("Bash(npm *)", "npm test & curl evil.example"),
        ("Bash(npm *)", "npm test | sh"),
        ("Bash(npm *)", "npm test\ncurl evil.example"),
        ("Bash(npm *)", "npm test &&\ncurl evil.example"),
        ("Bash(npm *)", "npm test $(curl evil.example)"),
        ("Bash(npm *)", "npm test `curl evil.example`"),
        ("Bash(npm *)", "npm test <(curl evil.example)"),
        ("Bash(npm *)", "(curl evil.example) && npm test"),
        ("Bash(npm *)", "npm test > .git/hooks/pre-commit"),
        ("Bash(npm *)", "npm test 'unended"),
        ("Bash(npm *)", "FOO=bar curl evil.example"),
    ],
)
def test_commands_that_an_allow_rule_does_not_cover(rule, command):
    assert bash(command, allow=[rule]) is ASK


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf x",
        "ls && rm -rf x",
        "ls;rm x",
        "ls\nrm x",
        "FOO=1 rm x",
        "timeout 5s rm x",
        "nohup nice -n 5 rm x",
        "echo $(rm x)",
        "echo `rm x`",
        "(rm x)",
        "'rm' x",
        "\\rm x",
        "true || rm x > /dev/null 2>&1",
    ],
)
@pytest.mark.parametrize("mode", ["bypassPermissions", "auto", "default"])
def test_a_deny_rule_finds_its_command(mode, command):
    assert bash(command, mode=mode, deny=["Bash(rm *)"]) is DENY


def test_a_deny_rule_leaves_others_alone():
    assert bash("rmdir x; echo 'rm x'", mode="bypassPermissions", deny=["Bash(rm *)"]) is ALLOW


@pytest.mark.parametrize(
    "command",
    [
        *("tee x", "sort -o x y", "uniq a b", "git -c core.pager=x log", "git log --output=x", "find . -delete"),
        *("env x", "rg --pre sh x", "cat <<E\nE", "x=$(ls)", "ls ${x}", "git push", "git", "$X y"),
    ],
)
def test_commands_that_do_not_only_read(command):
    assert bash(command) is ASK


@pytest.mark.parametrize(
    ("rule", "path", "matches"),
    [
        ("Read(.env)", "/workspace/.env", True),
        ("Read(.env)", "/workspace/deep/down/.env", True),
        ("Read(.env)", "/etc/.env", False),
        ("Read(//etc/**)", "/etc/passwd", True),
        ("Read(//etc)", "/etc/ssl/x", True),
        ("Read(/src/**)", "/workspace/src/a/b.py", True),
        ("Read(/src/*.py)", "/workspace/src/a/b.py", False),
        ("Read(/src/*.py)", "src/b.py", True),
        ("Read(./src)", "/workspace/x/src", False),
        ("Read(~/.ssh/**)", "/home/agent/.ssh/id", True),
        ("Read(~/.ssh/**)", "~/.ssh/id", True),
        ("Read(secrets/**)", "/workspace/a/../secrets/b", True),
        ("Read(**/secrets/*)", "/workspace/a/secrets/b", True),
        ("Read(a.py)", "/workspace/aXpy", False),
    ],
)
def test_rules_for_paths(rule, path, matches):
    found = verdict("bypassPermissions", "Read", {"file_path": path}, deny=[rule])
    assert (found.decision is DENY) == matches


@pytest.mark.parametrize(
    ("rule", "tool", "given", "matches"),
    [
        ("Edit(/a)", "Write", {"file_path": "/workspace/a"}, True),
        ("Edit", "NotebookEdit", {"notebook_path": "x.ipynb"}, True),
        ("Read(/a/**)", "Grep", {"pattern": "x", "path": "a/b"}, True),
        ("Read(/a/**)", "Grep", {"pattern": "x"}, False),
        ("Write", "Edit", {"file_path": "a"}, False),
        ("WebFetch(domain:example.org)", "WebFetch", {"url": "https://Example.org./x"}, True),
        ("WebFetch(domain:example.org)", "WebFetch", {"url": "https://example.org.evil.example/x"}, False),
        ("WebFetch(domain:example.org)", "WebFetch", {"url": "https://example.org@evil.example/x"}, False),
        ("WebFetch(domain:*.example.org)", "WebFetch", {"url": "https://a.example.org/x"}, True),
        ("WebFetch(domain:example.org)", "WebFetch", {"url": "http://[::1"}, False),
        ("mcp__github", "mcp__github__get", {}, True),
        ("mcp__github", "mcp__github2__get", {}, False),
        ("mcp__github__*", "mcp__github__get", {}, True),
        ("mcp__github__get", "mcp__github__get_all", {}, False),
        ("Agent(Explore)", "Task", {"subagent_type": "Explore"}, True),
        ("Skill(deploy *)", "Skill", {"skill": "deploy", "args": "prod"}, True),
        ("Skill(deploy)", "Skill", {"skill": "review"}, False),
    ],
)
def test_rules_for_other_tools(rule, tool, given, matches):
    found = verdict("bypassPermissions", tool, given, deny=[rule])
    assert (found.decision is DENY) == matches


@pytest.mark.parametrize("rule", ["", "Bash(", "Bash()", "(x)", "rm -rf", "Bash(x) y", "*"])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ValidationError):
        PermissionRules(allow=(rule,))


@given(st.text(max_size=60), st.sampled_from(list(PermissionMode)))
def test_any_command_gets_an_answer(command, mode):
    found = verdict(mode, "Bash", {"command": command}, allow=["Bash(npm *)"], ask=["Bash(git push *)"])
    assert found is None or found.decision in Decision


_SEPARATORS = ["&&", ";", "|", "&", "\n"]


@given(st.lists(st.sampled_from(["npm", "x", "curl", ">", "(", ")", "$(", "`", *_SEPARATORS]), max_size=9))
def test_what_is_joined_to_an_allowed_command_is_not_allowed_with_it(tokens):
    if bash(" ".join(tokens), allow=["Bash(npm *)"]) is not ALLOW:
        return
    assert not {">", "(", ")", "$(", "`"} & set(tokens)
    begun = [after for before, after in zip(["&&", *tokens], tokens, strict=False) if before in _SEPARATORS]
    assert set(begun) <= {"npm", *_SEPARATORS}


@pytest.mark.parametrize(
    ("path", "happens"),
    [
        ("/home/agent/.claude/plans/brave-fox.md", True),
        ("/home/agent/.claude/plans/../settings.md", False),
        ("/home/agent/.claude/settings.json", False),
        ("/workspace/plan.md", False),
    ],
)
def test_a_plan_may_be_written_down_while_planning(path, happens):
    found = verdict("plan", "Write", {"file_path": path, "content": "x"})
    assert (found.decision is ALLOW) == happens


@pytest.mark.parametrize(
    ("tool", "given", "rule"),
    [
        ("Bash", {"command": "git push origin main"}, "Bash(git push origin main)"),
        ("Bash", {"command": "make && make install"}, None),
        ("Bash", {"command": "rm *"}, None),
        ("Bash", {"command": "echo $(id)"}, None),
        ("Write", {"file_path": "/workspace/src/a.py"}, "Edit(/src/a.py)"),
        ("Edit", {"file_path": "/etc/hosts"}, "Edit(//etc/hosts)"),
        ("WebFetch", {"url": "https://example.com/x"}, "WebFetch(domain:example.com)"),
        ("mcp__shop__buy", {"what": "tea"}, "mcp__shop__buy"),
    ],
)
def test_the_rule_for_a_call_covers_it(tool, given, rule):
    assert rule_for(tool, given) == rule
    if rule is not None:
        assert verdict("default", tool, given, allow=[rule]).decision is ALLOW


@pytest.mark.parametrize(
    ("tool", "given", "expected", "why"),
    [
        ("Bash", {"command": "npm run test -- --watch"}, ALLOW, "an allow rule"),
        ("Bash", {"command": "npm run test && git push"}, ASK, "an ask rule"),
        ("Bash", {"command": "npm run test > log"}, ASK, "no rule allows it"),
        ("Bash", {"command": "git status | head"}, ALLOW, "it changes nothing"),
        ("Read", {"file_path": "src/.env"}, DENY, "a deny rule"),
        ("Write", {"file_path": "src/a.py"}, ASK, "no rule allows it"),
    ],
)
def test_the_examples_of_the_page(tool, given, expected, why):
    ruled = {"allow": ["Bash(npm run test *)"], "ask": ["Bash(git push *)"], "deny": ["Read(.env)"]}
    found = verdict("default", tool, given, **ruled)
    assert (found.decision, found.reason) == (expected, why)

"""`docs/api.md` has an example of every operation, and of none that is not there."""

import asyncio
import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
CALL = re.compile(r'^(?:api|curl) .*?\$(?P<base>[BH])(?P<path>/[^\s"?]*)')


def examples() -> list[tuple[str, str]]:
    """Method and path of every call that stands in a block of shell."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if call := CALL.search(line):
                said = re.search(r" -X ([A-Z]+) ", line)
                sends = re.search(r" (-d|--data\S*) ", line) and " -G " not in line
                method = said[1] if said else ("POST" if sends else "GET")
                found.append((method, ("/api/v1" if call["base"] == "B" else "") + call["path"]))
    return found


async def test_every_operation_has_an_example_on_the_page(build):
    # Made in a thread: it takes long.
    paths = (await asyncio.to_thread((await build()).app.openapi))["paths"]
    operations = {(method.upper(), path) for path, item in paths.items() for method in item}
    shown = set()
    for method, path in examples():
        # `$S` stands where a parameter does; the last parameter of files takes slashes too.
        fits = [
            operation
            for operation in operations
            if operation[0] == method
            and re.fullmatch(re.sub(r"\{\w+\}", r"\\$\\w+", operation[1].replace("{path}", "[^$]+")), path)
        ]
        assert len(fits) == 1, f"{method} {path} on the page is no operation of the API"
        shown.add(fits[0])
    assert shown == operations

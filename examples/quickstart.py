"""Opens a session, streams a turn, comes back to it.

    carrel serve --model-upstream scripted
    python examples/quickstart.py [URL] [KEY]

Without a key it is read from carrel-data/admin.key.
"""

import sys
from pathlib import Path

from carrel.client import Carrel, Delta


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    key = sys.argv[2] if len(sys.argv) > 2 else Path("carrel-data/admin.key").read_text().strip()
    with Carrel(url, key) as carrel:
        session = carrel.sessions.create(title="Quickstart")

        for frame in carrel.turns.stream(session.id, "[[write: hello.txt | Hello from the sandbox]] [[count: 5]]"):
            if isinstance(frame, Delta):
                if frame.kind == "text":
                    print(frame.text, end="", flush=True)
            elif frame.type == "tool.called":
                print(f"({frame.data['tool']})")
        print()

        result = carrel.turns.run(session.id, "[[bash: cat hello.txt]]")
        print(f"{result.status}: {result.text} (${result.cost_usd or 0:.4f})")
        print(carrel.files.read(session.id, "hello.txt").decode())

        carrel.sessions.delete(session.id)


if __name__ == "__main__":
    main()

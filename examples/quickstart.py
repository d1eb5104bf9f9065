"""What an application does for one of its users: opens a session, streams a turn, comes back to it, reads the usage.

    carrel serve --model-upstream scripted
    CARREL_KEY=carrel_sk_… python examples/quickstart.py      # a key: carrel keys create --user alice

CARREL_URL says where the server is. With CARREL_KEY unset it is the admin's, from carrel-data/admin.key.
"""

import os
from contextlib import closing
from pathlib import Path

from carrel.client import Carrel, Delta


def main() -> None:
    url = os.environ.get("CARREL_URL", "http://127.0.0.1:8000")
    key = os.environ.get("CARREL_KEY") or Path("carrel-data/admin.key").read_text().strip()
    with Carrel(url, key) as carrel:
        session = carrel.sessions.create(title="Quickstart", budget={"max_usd": 5})

        prompt = "[[write: hello.txt | Hello from the sandbox]] [[count: 5]]"
        with closing(carrel.turns.stream(session.id, prompt)) as frames:
            for frame in frames:
                if isinstance(frame, Delta):
                    if frame.kind == "text":
                        print(frame.text, end="", flush=True)
                elif frame.type == "tool.called":
                    print(f"({frame.data['tool']})")
        print()

        result = carrel.turns.run(session.id, "[[bash: cat hello.txt]]")
        print(f"{result.status}: {result.text}")
        print(carrel.files.read(session.id, "hello.txt").decode())

        for row in carrel.usage.get(["model"], session_id=session.id).data:
            print(f"{row.model}: {row.requests} requests, ${row.cost_usd or 0:.4f}")
        for budget in carrel.usage.budgets(session_id=session.id):
            if budget.left_usd is not None:
                print(f"left of the {budget.kind}'s budget: ${budget.left_usd:.4f}")

        carrel.sessions.delete(session.id)


if __name__ == "__main__":
    main()

"""The command line: `carrel serve`, `demo`, `chat`, `sessions`, `settings`, `doctor`."""

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    # Only now: whoever wires a server from here needs none of the commands.
    from carrel.cli.app import main as run

    run()

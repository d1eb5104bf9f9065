"""Sandboxes as processes of this host."""

from carrel.runtimes.local.runtime import LocalRuntime, LocalRuntimeOptions

__all__ = ["LocalRuntime", "LocalRuntimeOptions"]

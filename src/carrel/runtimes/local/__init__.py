"""Sandboxes as processes of this host."""

from carrel.runtimes.local.cgroups import Caps
from carrel.runtimes.local.runtime import LocalRuntime, LocalRuntimeOptions

__all__ = ["Caps", "LocalRuntime", "LocalRuntimeOptions"]

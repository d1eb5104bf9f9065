"""Who hears of a frame, now."""

from carrel.buses.memory import MemoryBus

__all__ = ["MemoryBus"]

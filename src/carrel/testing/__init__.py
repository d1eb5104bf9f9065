"""For authors of plug-ins and for tests of Carrel itself: conformance suites, fakes, faulty implementations.

conformance    a suite of checks for each contract of `carrel.abc`; plain async functions, any test runner will do
faulty         small named implementations that break one promise each
fakes          sandboxes without processes, which speak the link protocol within this process
gateway        store, bus, owner, hub and service wired together over fakes
"""

from carrel.testing.fakes import FakeHost, FakeRuntime, FakeTurn
from carrel.testing.gateway import FakeGateway

__all__ = ["FakeGateway", "FakeHost", "FakeRuntime", "FakeTurn"]

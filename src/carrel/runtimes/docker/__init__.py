"""Sandboxes as containers of a Docker engine, or of whatever speaks its API."""

from carrel.runtimes.docker.container import Caps, ContainerOptions
from carrel.runtimes.docker.engine import EngineTls
from carrel.runtimes.docker.runtime import DockerRuntime, DockerRuntimeOptions

__all__ = ["Caps", "ContainerOptions", "DockerRuntime", "DockerRuntimeOptions", "EngineTls"]

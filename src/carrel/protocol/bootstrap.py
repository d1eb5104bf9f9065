"""What a runner is born with. It is handed over on a descriptor, never in an environment or an argument."""

from __future__ import annotations

from pydantic import Field

from carrel.model import Frozen


class Mount(Frozen):
    """A place of the host that the runner's own mount namespace shows elsewhere."""

    source: str
    target: str
    within: str | None = Field(
        default=None,
        description="The last folder above the source that no agent can change; no link below is followed.",
    )


EGRESS_SOCKET = "egress.sock"
"""The egress proxy's, in the folder of the model gateway's socket."""
EGRESS_PORT = 3128
"""Where programs in a sandbox find the road to the egress proxy, on its own loopback."""


GATEWAY_PORT = 3129
"""Where an agent finds the MCP servers that the gateway answers for, on its sandbox's own loopback."""
GATEWAY_URL = "http://gateway"
"""What the gateway is called where its address is not known yet: an agent is told another, or asks by a unix socket."""


class Road(Frozen):
    """The road from a port of the sandbox's loopback to a unix socket of the gateway's."""

    socket: str = Field(description="The unix socket, as the runner sees it.")
    port: int = Field(default=EGRESS_PORT, description="0: any that is free, where the loopback is others' too.")
    entrance: str | None = Field(
        default=None,
        description="The folder with the pipes `wall` and `go` of a wall that waits for its port; None where the runner "
        "is inside of the sandbox.",
    )


class Bootstrap(Frozen):
    """A runner's identity, its road to the gateway, and how its agent is started."""

    sandbox_id: str
    generation: int
    link_socket: str = Field(description="The unix socket the runner dials.")
    link_token: str = Field(repr=False)
    agent_token: str = Field(repr=False, description="What the agent shows the model gateway.")
    lock_path: str = Field(description="Held for the runner's life; who can take it knows that the runner is gone.")
    log_path: str
    spool_path: str = Field(description="Where frames go that no longer fit into memory.")
    cli_path: str = Field(description="What to run as Claude Code: the program itself, or a wrapper that isolates it.")
    cwd: str = Field(description="The working directory as the agent sees it.")
    workspace: str = Field(description="The same directory as the runner sees it.")
    home: str = Field(description="The agent's home as the runner sees it.")
    config_dir: str = Field(description="The agent's configuration directory as the agent sees it.")
    plugins: list[str] = Field(default=[], description="Folders of Claude Code's plugins as the agent sees them.")
    direct: bool = Field(default=False, description="Whether the agent asks the model's provider itself.")
    agent_env: dict[str, str] = Field(repr=False, description="The whole environment of the agent, its token aside.")
    late_env_path: str | None = Field(
        default=None,
        description="The file of NUL-ended arguments of bubblewrap to which variables of the session's are added, "
        "rather than to the environment of the programs that build the wall.",
    )
    owner: tuple[int, int] | None = Field(default=None, description="User and group of the agent's files.")
    mounts: list[Mount] = Field(default=[], description="Made before anything else, in a mount namespace of its own.")
    mount_root: str | None = Field(default=None, description="An empty directory to mount them under.")
    places: dict[str, tuple[int, int]] = Field(
        default={},
        description="Folders that must be these, by device and inode: whoever mounted them followed paths that an "
        "agent may have changed.",
    )
    subreaper: bool = Field(default=False, description="Adopt and end whatever the agent leaves behind.")
    own_caps: bool = Field(default=False, description="The runner is under the agent's caps itself, and tells of them.")
    egress: Road | None = Field(default=None, description="None: nothing but the gateway is reached, or all is.")
    mcp: Road | None = Field(default=None, description="To the MCP servers that the gateway answers for, if there are.")
    gateway_socket: str | None = Field(
        default=None, description="The gateway's that sandboxes see, as the runner sees it."
    )
    skills: str | None = Field(
        default=None, description="The plugin with the skills that come with the gateway's tools, as the agent sees it."
    )
    reconnect_window_seconds: float = 300.0
    max_frame_bytes: int = 64 * 1024 * 1024
    outbox_memory_bytes: int = 64 * 1024 * 1024
    outbox_disk_bytes: int = 1024 * 1024 * 1024
    disk_reserve_bytes: int = Field(default=0, description="A disk with less room than this counts as full.")
    max_retries: int = Field(default=20, description="How often the agent repeats a failed model request.")

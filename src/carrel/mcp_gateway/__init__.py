"""The road to MCP servers that need a secret: the gateway adds it, and no sandbox ever holds it."""

from carrel.mcp_gateway.app import McpGateway

__all__ = ["McpGateway"]

"""The MCP server of the gateway: tools by which agents start and lead children, and by which clients lead sessions."""

from carrel.tools.inside import inside
from carrel.tools.outside import outside
from carrel.tools.server import ToolServer

__all__ = ["ToolServer", "inside", "outside"]

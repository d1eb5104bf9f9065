"""What stands between a gateway in a container and its engine's socket: it passes on what making sandboxes takes."""

from carrel.socket_proxy.containers import checked_container
from carrel.socket_proxy.folders import Bindable
from carrel.socket_proxy.proxy import SocketProxy, SocketProxyOptions

__all__ = ["Bindable", "SocketProxy", "SocketProxyOptions", "checked_container"]

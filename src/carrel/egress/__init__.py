"""The egress proxy: what sandboxes reach beside the gateway, and the record of what they asked for."""

from carrel.egress.addresses import Judge
from carrel.egress.dialling import Dialler, NotDialled
from carrel.egress.ledger import Ledger
from carrel.egress.proxy import EgressLimits, EgressProxy
from carrel.egress.transport import CheckedTransport

__all__ = ["CheckedTransport", "Dialler", "EgressLimits", "EgressProxy", "Judge", "Ledger", "NotDialled"]

"""Protection against peers that exhaust this process: one module for each mechanism.

===================== ======================================= ==================================
module                stops                                   by
===================== ======================================= ==================================
`byte_accounting`     endless messages, peers that don't read dropping the connection
`connection_limits`   half-open floods, too many connections  dropping the oldest connection
`rate_limit`          message floods, reconnect storms        refusing, or a ban (`penalty_box`)
`penalty_box`         a key that broke a rule and comes back  refusing its handshakes for a while
`memory_watch`        whatever the others miss                closing and reopening the socket
===================== ======================================= ==================================

`Connections` combines the first two for one socket. Call `received` and `sent` for every message.
`check` drops the connections that break a limit, and `drop` those of a user.
"""

from transport.dos_protection.connections import Connections
from transport.dos_protection.limits import ConnectionLimits, Reason, connection_limits
from transport.dos_protection.memory_watch import MemoryWatch
from transport.dos_protection.penalty_box import PenaltyBox
from transport.dos_protection.rate_limit import RateLimit

__all__ = [
    "ConnectionLimits",
    "Connections",
    "MemoryWatch",
    "PenaltyBox",
    "RateLimit",
    "Reason",
    "connection_limits",
]

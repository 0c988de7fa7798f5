"""Where a server that is started here can be reached, and by whom: said to its user."""

from __future__ import annotations

import ipaddress
import socket
import sys

from pagoda.options.config import Options
from pagoda.options.resolve import Settings


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def print_notes(settings: Settings) -> None:
    """What the user should know of the options that were given."""
    options = settings.options
    notes = list(settings.notices)
    if options.uds is None and not options.api_key and not is_loopback(options.host):
        who = f"everyone who can reach {options.host}:{options.port}"
        notes.append(f"{who} may use this server; --api-key KEY asks for a key")
    for line in notes:
        print(f"note: {line}", file=sys.stderr)


def address(options: Options, listener: socket.socket) -> str:
    """What to open in a client on this machine."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    port = listener.getsockname()[1]
    everywhere = options.host in ("", "0.0.0.0", "::")
    host = "localhost" if everywhere or is_loopback(options.host) else options.host
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

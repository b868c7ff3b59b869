"""Channel and server options, each with its reason."""

from __future__ import annotations

INTERNAL_MESSAGE_BYTES = 64 << 20
"""Between workers, routers and supervisor: a prompt of a million tokens is 4 MiB."""

"""What a client shows to a router, and how it knows that it speaks to the right one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Access:
    """`api_key`: sent with every call. `tls`: speak TLS, and know the router by the authorities of the file `ca` (PEM), or of the system.
    A `ca` alone asks for TLS too."""

    api_key: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: str | None = None

    @property
    def encrypted(self) -> bool:
        return self.tls or self.ca is not None

    @property
    def scheme(self) -> str:
        """Of a URL of the HTTP face."""
        return "https" if self.encrypted else "http"

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP and gRPC carry alike."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


OPEN = Access()
"""To a router that wants no key and speaks plainly."""

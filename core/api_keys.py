"""API keys as they are kept: by their SHA-256, never themselves. A key is 256 random bits, so a plain hash is as good as a slow one."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field

_PREFIX = "dpt"
"""What every key begins with, so that whoever scans for leaked secrets can know one."""

TENANT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""What a tenant may be called, wherever the name comes from."""


class ApiKey(BaseModel):
    """One key. `id` is part of the key's text and no secret; times are UTC, in ISO format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    tenant: str = Field(pattern=TENANT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str
    revoked: str | None = None


class ApiKeyFile(BaseModel):
    """What the file of `security.api_keys` holds, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...] = ()


def new_key(tenant: str) -> tuple[str, ApiKey]:
    """A fresh key of `tenant`, and what is kept of it. Raises `ValueError` for a name that is none."""
    number = secrets.token_hex(4)
    key = f"{_PREFIX}-{number}-{secrets.token_urlsafe(32)}"
    return key, ApiKey(id=number, tenant=tenant, sha256=sha256_of(key), created=now())


def sha256_of(key: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def id_of(key: str) -> str:
    """The id in a key's text; "" in what is none."""
    parts = key.split("-", 2)
    return parts[1] if len(parts) == 3 and parts[0] == _PREFIX else ""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

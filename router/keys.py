"""Who a request is from: API keys, from a file that is read again whenever it has changed."""

from __future__ import annotations

import hmac
import logging
from functools import partial
from pathlib import Path

from ..core.api_keys import ApiKey, ApiKeyFile, id_of, sha256_of
from ..core.errors import ConfigError, Unauthenticated
from ..core.watched import Watched, words

log = logging.getLogger(__name__)

_NOBODY = "0" * 64
"""Compared with where there is no such key, so that this takes as long."""


class KeyRing:
    """The keys of a file; `ring.tenant` is a `TenantOf`.

    A look at the file for each request, 2 µs, finds that it has changed: a new key is good and a revoked one is not from the next request
    on. A file that cannot be read any more, or holds no keys, leaves those that were read last, and the log says so.
    """

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` naming `security.api_keys` if the file cannot be read."""
        try:
            self._file = Watched((path,), partial(_read, path))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"security.api_keys: {path} holds no keys that can be read ({words(error)}). "
                f"`diptych keys new --tenant NAME --file {path}` makes the first.",
                field="security.api_keys",
            ) from None

    def tenant(self, authorization: str | None) -> str:
        """Raises `Unauthenticated` for no key, a wrong one and a revoked one."""
        key = bearer(authorization)
        if self._file.refresh():
            good = sum(key.revoked is None for key in self._file.value.values())
            log.info("API keys: %d good, %d revoked", good, len(self._file.value) - good)
        known = self._file.value.get(id_of(key))
        right = hmac.compare_digest(sha256_of(key), known.sha256 if known else _NOBODY)
        if known is None or not right or known.revoked is not None:
            raise Unauthenticated("The API key is not known here, or no longer.")
        return known.tenant


def bearer(authorization: str | None) -> str:
    """What is shown. Raises `Unauthenticated` for nothing."""
    scheme, _, shown = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not shown.strip():
        raise Unauthenticated("There is no API key or token: send one as `Authorization: Bearer KEY`.")
    return shown.strip()


def _read(path: Path) -> dict[str, ApiKey]:
    keys = ApiKeyFile.model_validate_json(path.read_bytes()).keys
    if not keys:
        raise ValueError("it has none")
    return {key.id: key for key in keys}

"""Who a request is from: API keys, from a file that is read again whenever it has changed."""

from __future__ import annotations

import hmac
import logging
import os
from pathlib import Path

from pydantic import ValidationError

from ..core.api_keys import ApiKey, ApiKeyFile, id_of, sha256_of
from ..core.errors import ConfigError, Unauthenticated

log = logging.getLogger(__name__)

_NOBODY = "0" * 64
"""Compared with where there is no such key, so that this takes as long."""


class KeyRing:
    """The keys of a file; `ring.tenant` is a `TenantOf`.

    A stat for each request, 2 µs, finds that the file has changed: a new key is good and a revoked one is not from the next request on.
    A file that cannot be read any more, or holds no keys, leaves those that were read last, and the log says so.
    """

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` naming `security.api_keys` if the file cannot be read."""
        self._path = path
        self._seen = signature(path)
        try:
            self._keys = _read(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"security.api_keys: {path} holds no keys that can be read ({_words(error)}). "
                f"`diptych keys new --tenant NAME --file {path}` makes the first.",
                field="security.api_keys",
            ) from None

    def tenant(self, authorization: str | None) -> str:
        """Raises `Unauthenticated` for no key, a wrong one and a revoked one."""
        key = bearer(authorization)
        self._refresh()
        known = self._keys.get(id_of(key))
        right = hmac.compare_digest(sha256_of(key), known.sha256 if known else _NOBODY)
        if known is None or not right or known.revoked is not None:
            raise Unauthenticated("The API key is not known here, or no longer.")
        return known.tenant

    def _refresh(self) -> None:
        found = signature(self._path)
        if found == self._seen:
            return
        self._seen = found
        try:
            self._keys = _read(self._path)
        except (OSError, ValueError) as error:
            log.error("%s cannot be read any more (%s): the keys that were there before stay good", self._path, _words(error))
        else:
            good = sum(key.revoked is None for key in self._keys.values())
            log.info("API keys read again: %d good, %d revoked", good, len(self._keys) - good)


def bearer(authorization: str | None) -> str:
    """What is shown. Raises `Unauthenticated` for nothing."""
    scheme, _, shown = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not shown.strip():
        raise Unauthenticated("There is no API key or token: send one as `Authorization: Bearer KEY`.")
    return shown.strip()


def signature(path: Path) -> tuple[int, int, int]:
    """Changes whenever the file does; following links, which is how Kubernetes replaces a mounted secret."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _read(path: Path) -> dict[str, ApiKey]:
    keys = ApiKeyFile.model_validate_json(path.read_bytes()).keys
    if not keys:
        raise ValueError("it has none")
    return {key.id: key for key in keys}


def _words(error: OSError | ValueError) -> str:
    """Without what was in the file."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return str(error)

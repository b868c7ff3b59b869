"""The keys that tokens are signed with: a JWK set, from a file that is read again when it changes or a URL that is asked again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from ..core.errors import ConfigError
from ..core.security import JwtSection
from ..core.watched import Watched, words

log = logging.getLogger(__name__)

REFRESH_S = 300.0
"""How often a URL is asked. Who signs shows a new key before using it, so that those who ask now and then have it in time."""
LEAST_S = 30.0
"""Between two times, whatever tokens name and however often it fails: nobody makes the router ask more often."""
FETCH_S = 10.0
"""In which the whole answer must be there."""
MAX_BYTES = 1 << 20
"""Of an answer; a key is a few hundred bytes, and a set has few."""

_FAULTS = (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL)
"""What reading keys may raise, from whatever place."""

_PRIVATE = "d"
"""The member of a JWK, RSA, EC or OKP, that only its private half has."""


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A public key, of `cryptography`, and the algorithms that it may be used with."""

    kid: str | None
    key: Any
    algorithms: frozenset[str]


KeySet = tuple[VerifyingKey, ...]


class KeySource(Protocol):
    def keys(self) -> KeySet:
        """Those that are good now; never waits."""

    def missed(self) -> None:
        """A token names a key that is not there."""

    async def follow(self) -> None:
        """Keep up with what is elsewhere, until cancelled."""


async def open_keys(section: JwtSection) -> KeySource:
    """Raises `ConfigError` naming `security.jwt.jwks` if it holds no key that could be used."""
    try:
        if section.is_url:
            context = ssl.create_default_context()
            return UrlKeys(section, context, read_keys(await _fetch(section.jwks, context), section.algorithms))
        return FileKeys(Path(section.jwks), section.algorithms)
    except _FAULTS as error:
        field = "security.jwt.jwks"
        raise ConfigError(f"{field}: {section.jwks} has no keys that can be read ({words(error)}).", field=field) from None


class FileKeys:
    """Of a file. What cannot be read any more leaves those that were read last, and the log says so."""

    def __init__(self, path: Path, algorithms: Collection[str]) -> None:
        """Raises `OSError` and `ValueError`."""
        self._file = Watched((path,), lambda: read_keys(path.read_bytes(), algorithms))

    def keys(self) -> KeySet:
        if self._file.refresh():
            log.info("keys of tokens: %d", len(self._file.value))
        return self._file.value

    def missed(self) -> None:
        return None

    async def follow(self) -> None:
        return None


class UrlKeys:
    """Of a URL, asked by a task beside the requests. A failure leaves the keys that were had last, and the log says so."""

    def __init__(self, section: JwtSection, context: ssl.SSLContext, keys: KeySet) -> None:
        self._section = section
        self._context = context
        self._keys = keys
        self._missed = asyncio.Event()
        self._fault: str | None = None

    def keys(self) -> KeySet:
        return self._keys

    def missed(self) -> None:
        self._missed.set()

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(LEAST_S)
            if self._fault is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._missed.wait(), REFRESH_S - LEAST_S)
            self._missed.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        url = self._section.jwks
        try:
            keys = read_keys(await _fetch(url, self._context), self._section.algorithms)
        except _FAULTS as error:
            fault = words(error)
            if fault != self._fault:  # not every 30 s the same
                log.error("%s gives no keys any more (%s): those of before stay good; it is asked every %g s", url, fault, LEAST_S)
            self._fault = fault
            return
        if keys != self._keys or self._fault is not None:
            log.info("keys of tokens had from %s: %d", url, len(keys))
        self._keys, self._fault = keys, None


def read_keys(data: bytes, algorithms: Collection[str]) -> KeySet:
    """The keys of a JWK set (RFC 7517) that sign by one of `algorithms`; others, and those for encryption, are left out.

    Raises `ValueError`, whose words have nothing of `data`, for what is no set, for one without such a key, and for one with a private
    key in it.
    """
    try:
        entries = json.loads(data)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it is no JWK set, an object with a list `keys`")
    if any(_PRIVATE in entry for entry in entries):
        raise ValueError("it has a private key in it, with which whoever reads it can sign")
    keys = tuple(key for entry in entries if (key := _verifying(entry, algorithms)) is not None)
    if not keys:
        raise ValueError(f"it has no public key for {', '.join(algorithms)}")
    return keys


def _verifying(entry: dict[str, Any], algorithms: Collection[str]) -> VerifyingKey | None:
    if entry.get("use", "sig") != "sig":
        return None
    try:
        key = PyJWK(entry)
    except (PyJWTError, ValueError, TypeError):
        return None
    # A set need not say the algorithm. An RSA key then does for any of RSA's; PyJWT has derived that of a curve.
    free = key.key_type == "RSA" and "alg" not in entry
    good = frozenset(name for name in algorithms if (name[:2] in ("RS", "PS") if free else name == key.algorithm_name))
    return VerifyingKey(key.key_id, key.key, good) if good else None


async def _fetch(url: str, context: ssl.SSLContext) -> bytes:
    """Follows no redirect: whose keys are trusted is what the config says."""
    try:
        async with (
            asyncio.timeout(FETCH_S),
            httpx.AsyncClient(verify=context, timeout=FETCH_S) as client,
            client.stream("GET", url, headers={"accept": "application/json"}) as answer,
        ):
            if answer.status_code != 200:
                raise ValueError(f"the answer is {answer.status_code}")
            data = bytearray()
            async for part in answer.aiter_bytes():
                data += part
                if len(data) > MAX_BYTES:
                    raise ValueError(f"the answer is longer than {MAX_BYTES} bytes")
            return bytes(data)
    except TimeoutError:
        raise ValueError(f"no answer in {FETCH_S:g} s") from None

"""Who a request is from, whichever way the config lets him say it: by an API key, or by a token (JWT) of the identity provider's."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import jwt
from jwt.exceptions import ExpiredSignatureError, ImmatureSignatureError, PyJWTError

from ..core.api_keys import TENANT
from ..core.errors import Unauthenticated
from ..core.security import JwtSection
from .jwks import KeySource, VerifyingKey, open_keys
from .keys import KeyRing, bearer

log = logging.getLogger(__name__)

LEEWAY_S = 30
"""How far the issuer's clock may be from ours. Hosts with NTP are within a second; those without drift by some a day."""

_NOT_GOOD = "The token is not good here."
"""Whatever is wrong with it: which, is for who could use it."""


class Doors:
    """`doors.tenant` is a `TenantOf`."""

    def __init__(self, ring: KeyRing | None, tokens: TokenCheck) -> None:
        """`ring` None: there are tokens only."""
        self._ring = ring
        self._tokens = tokens

    def tenant(self, authorization: str | None) -> str:
        """Three parts between dots are a token, and anything else an API key, in which there is no dot. Raises `Unauthenticated`."""
        shown = bearer(authorization)
        if shown.count(".") == 2 or self._ring is None:
            return self._tokens.tenant(shown)
        return self._ring.tenant(authorization)

    async def follow(self) -> None:
        """Keep up with the issuer's keys, until cancelled."""
        await self._tokens.follow()


async def open_doors(api_keys: Path | None, section: JwtSection) -> Doors:
    """Raises `ConfigError` naming the key of the config for keys that cannot be read."""
    ring = None if api_keys is None else KeyRing(api_keys)
    return Doors(ring, TokenCheck(section, await open_keys(section)))


class TokenCheck:
    """Tokens of one issuer, for one audience."""

    def __init__(self, section: JwtSection, source: KeySource) -> None:
        self._section = section
        self._source = source

    def tenant(self, token: str) -> str:
        """Raises `Unauthenticated`: in words about its times if only they are wrong, as the signature is looked at first."""
        try:
            key = self._key(jwt.get_unverified_header(token))
            claims = jwt.decode(
                token, key.key, algorithms=sorted(key.algorithms), audience=self._section.audience, issuer=self._section.issuer,
                leeway=LEEWAY_S, options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
            )  # fmt: skip
        except ExpiredSignatureError:
            raise Unauthenticated("The token has expired.") from None
        except ImmatureSignatureError:
            raise Unauthenticated("The token is not valid yet.") from None
        except (PyJWTError, ValueError, TypeError) as error:
            log.debug("a token was refused: %s", type(error).__name__)  # not its words, which may be the token's
            raise Unauthenticated(_NOT_GOOD) from None
        tenant = claims.get(self._section.tenant_claim)
        if not isinstance(tenant, str) or not re.fullmatch(TENANT, tenant):
            raise Unauthenticated(f"The token's claim {self._section.tenant_claim} is no name of a tenant.")
        return tenant

    async def follow(self) -> None:
        await self._source.follow()

    def _key(self, header: dict[str, object]) -> VerifyingKey:
        """The key that the token names, or without a name the only one there is. Raises `Unauthenticated`."""
        kid, keys = header.get("kid"), self._source.keys()
        named = [key for key in keys if kid is None or key.kid == kid]
        if not named:
            self._source.missed()
        fitting = [key for key in named if header.get("alg") in key.algorithms]
        if not fitting or (kid is None and len(keys) > 1):
            log.debug("a token was refused: %s", "its algorithm is not that of its key" if named else "no such key")
            raise Unauthenticated(_NOT_GOOD)
        return fitting[0]

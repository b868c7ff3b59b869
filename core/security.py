"""Who may come in, and what is encrypted: the config's section, and the files of a certificate."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from .section import Section

INTERNAL_NAME = "diptych.internal"
"""The name in the certificates of a cluster's processes. It is one for all: a process may be on any host, and being of the cluster is
what counts."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files. `ca`: the authority of who may come in (a cluster's own); None on a public face, which takes everybody."""

    cert: Path
    key: Path
    ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.cert, self.key) if self.ca is None else (self.cert, self.key, self.ca)


class PublicTls(Section):
    cert: str = Field(description="The router's certificate and what is between it and the authority, PEM. Read again when it changes.")
    key: str = Field(description="Its private key, PEM. Read again when it changes.")
    ca: str | None = Field(
        None, description="The authority by which `diptych` itself, on this host, knows the router; by default those of the system."
    )


class InternalTls(Section):
    ca: str = Field(
        description="The cluster's own authority, PEM: whoever has a certificate from it is of the cluster. Read again when it changes."
    )
    cert: str = Field(description="The certificate of the cluster's processes, for the name diptych.internal, PEM.")
    key: str = Field(description="Its private key, PEM.")


class Internal(StrEnum):
    """What processes of the cluster say to each other: `plain`, under `mutual` TLS, or `auto`: mutual wherever it leaves the host."""

    AUTO = "auto"
    MUTUAL = "mutual"
    PLAIN = "plain"


JwtAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""By a key pair, all of them: with a shared secret (HS256) whoever can check a token could make one."""


class JwtSection(Section):
    issuer: str = Field(min_length=1, description="Who signs: the claim `iss`, letter for letter.")
    audience: str = Field(min_length=1, description="For whom: what the claim `aud` must be, or have in its list.")
    jwks: str = Field(
        min_length=1,
        description="The issuer's public keys, a JWK set: a file, read again when it changes, or an https URL, asked every 5 minutes.",
    )
    tenant_claim: str = Field(
        "sub",
        min_length=1,
        description="The claim that is the tenant. sub, which every OIDC token has, is the user himself; where users of an organisation "
        "may share a cache, name the claim with the organisation.",
    )
    algorithms: tuple[JwtAlgorithm, ...] = Field(("RS256", "ES256", "EdDSA"), min_length=1, description="By which it may be signed.")

    @property
    def is_url(self) -> bool:
        return "://" in self.jwks

    def from_here(self) -> JwtSection:
        """The same for a process in another directory."""
        return self if self.is_url else self.model_copy(update={"jwks": str(Path(self.jwks).absolute())})

    @field_validator("jwks")
    @classmethod
    def _is_a_file_or_https(cls, value: str) -> str:
        if "://" in value:
            url = urlsplit(value)
            if url.scheme != "https" or not url.hostname or url.port == 0:
                raise ValueError("a URL must be https://HOST/…: whoever could change keys on their way could sign for anybody")
        return value


class SecuritySection(Section):
    api_keys: str | None = Field(
        None,
        description="A file made by `diptych keys`. With it every request needs a key, and is of the key's tenant. Read again when it "
        "changes.",
    )
    jwt: JwtSection | None = Field(
        None, description="Tokens (JWT) of an OIDC identity provider: good in place of API keys, or beside them if there are both."
    )
    open_metrics: bool = Field(False, description="With API keys or tokens: whether `/metrics` answers without one. `/health` always does.")
    tls: PublicTls | None = Field(None, description="TLS on both public faces, HTTP and gRPC.")
    internal: Internal = Field(
        Internal.AUTO,
        description="Mutual TLS between router, workers and their ranks: auto (when workers may be on several hosts, or internal_tls is "
        "given), mutual (always), plain (never). Without internal_tls `up` makes an authority of its own, which ends with the cluster.",
    )
    internal_tls: InternalTls | None = Field(
        None, description="Files for that, at the same paths on every host; `diptych certs` makes them."
    )
    allow_unauthenticated: bool = Field(
        False,
        description="Let the cluster listen beyond loopback, or join a Ray cluster that asks for no token, although who comes is not asked "
        "who he is.",
    )

    @property
    def asks(self) -> bool:
        """Whether who comes is asked who he is."""
        return self.api_keys is not None or self.jwt is not None

    @model_validator(mode="after")
    def _is_one_thing(self) -> SecuritySection:
        if self.internal is Internal.PLAIN and self.internal_tls is not None:
            raise ValueError("internal is plain, and internal_tls is given: leave one of them out")
        return self

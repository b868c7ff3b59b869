"""Who could come in, as the config stands: what would be open to strangers is refused before anything listens."""

from __future__ import annotations

import ipaddress
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.security import INTERNAL_NAME, Internal, TlsFiles
from ...core.tls import read_pems
from ..process.identities import is_mutual

if TYPE_CHECKING:
    from cryptography import x509

SOON = timedelta(days=14)
"""A certificate that ends within so long is told of at the start."""


def check(config: ClusterConfig) -> None:
    """`ConfigError` if anybody could come in beyond loopback unasked, and the config does not say that this is wanted; and for
    certificates that nobody would accept."""
    security = config.security
    _check_certificates(config)
    if security.allow_unauthenticated:
        return
    if not security.asks and not is_loopback(config.router.host):
        raise ConfigError(
            f"router.host: {config.router.host} lets others than this host in, and nobody is asked who he is. Make a key "
            "(`diptych keys new --tenant NAME --file keys.json`) and name the file as security.api_keys, or take the tokens of an "
            "identity provider (security.jwt); or, on a network where everybody may come in, say security.allow_unauthenticated: true.",
            field="security.api_keys",
        )
    if config.ray.joined and security.internal is Internal.PLAIN:
        raise ConfigError(
            "security.internal: plain would leave the workers of a joined Ray cluster open to whoever reaches their hosts. Leave it out "
            "(they speak mutual TLS then), or say security.allow_unauthenticated: true.",
            field="security.internal",
        )


def warnings(config: ClusterConfig) -> list[str]:
    """What will work, and should be known."""
    said: list[str] = []
    security, beyond = config.security, not is_loopback(config.router.host)
    if security.allow_unauthenticated and not security.asks and beyond:
        said.append("security.allow_unauthenticated: whoever reaches this host may use the model.")
    if security.asks and security.tls is None and beyond:
        said.append("API keys and tokens cross the network unencrypted: give security.tls, unless a proxy before the router does TLS.")
    if security.allow_unauthenticated and config.ray.joined:
        said.append("security.allow_unauthenticated: unless Ray asks for a token, whoever reaches it may run programs on its nodes.")
    for files in _files(config):
        ends = _end(files)
        if (left := ends - datetime.now(UTC)) < SOON:
            said.append(
                f"The certificate {files.cert} ends in {_rounded(left)}, on {ends.date()}; a new one in its place is taken at once."
            )
    return said


def _rounded(left: timedelta) -> str:
    """Whole days, of which nobody takes the last for none: of less than two, the hours."""
    if left.days > 1:
        return f"{left.days} days"
    hours = left // timedelta(hours=1)
    return f"{hours} hours" if hours > 1 else "less than two hours"


def is_loopback(host: str) -> bool:
    """Whether nobody but this host can come to `host`. A name that is none is for `preflight.check_ports` to refuse."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (socket.gaierror, UnicodeError):
        return True
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _files(config: ClusterConfig) -> list[TlsFiles]:
    """Every certificate that the config names."""
    security = config.security
    found = [TlsFiles(Path(security.tls.cert), Path(security.tls.key))] if security.tls else []
    if security.internal_tls and is_mutual(config):
        internal = security.internal_tls
        found.append(TlsFiles(Path(internal.cert), Path(internal.key), Path(internal.ca)))
    return found


def _check_certificates(config: ClusterConfig) -> None:
    for files in _files(config):
        key = "security.tls" if files.ca is None else "security.internal_tls"
        try:
            read_pems(files)
            names, ends = _names(files), _end(files)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{key}: {error}", field=key) from None
        if ends < datetime.now(UTC):
            raise ConfigError(f"{key}.cert: {files.cert} ended on {ends.date()}; `diptych certs` makes another.", field=f"{key}.cert")
        if files.ca is not None and INTERNAL_NAME not in names:
            raise ConfigError(
                f"{key}.cert: {files.cert} is for {', '.join(names) or 'no name'}, and must be for {INTERNAL_NAME}.", field=f"{key}.cert"
            )


def _end(files: TlsFiles) -> datetime:
    return _certificate(files).not_valid_after_utc


def _names(files: TlsFiles) -> list[str]:
    from cryptography import x509

    try:
        found = _certificate(files).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return list(found.value.get_values_for_type(x509.DNSName))


def _certificate(files: TlsFiles) -> x509.Certificate:
    from cryptography import x509

    return x509.load_pem_x509_certificate(files.cert.read_bytes())

"""TLS for gRPC: of a cluster's processes with each other, of the public face, and of its clients."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import grpc

from ..core.access import Access
from ..core.errors import ConfigError
from ..core.security import INTERNAL_NAME, TlsFiles
from ..core.tls import Certificates, Pems

INTERNAL_OPTIONS = [("grpc.ssl_target_name_override", INTERNAL_NAME), ("grpc.default_authority", INTERNAL_NAME)]
"""For a channel to a process of the cluster, which is known by this name wherever it is."""


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Of the files as they are at each handshake; with an authority only who has a certificate from it gets in. Raises `ConfigError`."""
    certificates = Certificates(files)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(certificates.pems) if certificates.refresh() else None

    asks = files.ca is not None
    # None is grpc's word for "as before", which the stubs do not know.
    return grpc.dynamic_ssl_server_credentials(_configuration(certificates.pems), cast(Any, fetch), require_client_authentication=asks)


def _configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], root_certificates=pems.ca)


_certificates = cache(Certificates)
"""One look for all channels of a process: what was good before is used while files are being replaced."""


def current(files: TlsFiles) -> Pems:
    """As they are now, or were when they could last be used; the same object as long as they are the same. Raises `ConfigError`."""
    certificates = _certificates(files)
    certificates.refresh()
    return certificates.pems


def internal_credentials(files: TlsFiles | None) -> grpc.ChannelCredentials | None:
    """For a channel to a process of the cluster; None for a plain one. Raises `ConfigError`."""
    if files is None:
        return None
    pems = current(files)
    return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)


def client_credentials(access: Access) -> grpc.ChannelCredentials | None:
    """None for a plain channel. Raises `ConfigError` for an authority that cannot be read."""
    if not access.encrypted:
        return None
    return grpc.ssl_channel_credentials(None if access.ca is None else _authority(Path(access.ca)))


def _authority(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The authority {path} cannot be read: {error.strerror}.", field="ca") from None

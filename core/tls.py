"""TLS from files that may be replaced while they are in use: what is read is checked whole, and what cannot be used changes nothing."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import partial

from .errors import ConfigError
from .security import TlsFiles
from .watched import Watched, words


@dataclass(frozen=True, slots=True)
class Pems:
    """What `TlsFiles` hold."""

    cert: bytes
    key: bytes
    ca: bytes | None


class Certificates:
    """What was last read from such files: as `pems`, and as a server's `context`. Used by any thread."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises `ConfigError` if they are not a certificate, its key and an authority."""
        self._watched = Watched(files.all, partial(_read, files))

    @property
    def pems(self) -> Pems:
        return self._watched.value[0]

    @property
    def context(self) -> ssl.SSLContext:
        return self._watched.value[1]

    def refresh(self) -> bool:
        """Whether they have changed since the last look, and are good. Half a change is none: certificate and key must fit each other."""
        return self._watched.refresh()


def read_pems(files: TlsFiles) -> Pems:
    """Raises `ConfigError` naming the file that is wrong."""
    return _read(files)[0]


def _read(files: TlsFiles) -> tuple[Pems, ssl.SSLContext]:
    context = server_context(files)
    try:
        cert, key, *ca = [path.read_bytes() for path in files.all]
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.", field="security") from None
    return Pems(cert, key, ca[0] if ca else None), context


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For who is connected to; with an authority only its own may connect. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # every connection shows its certificate: none is resumed with one that has expired since
    _load(context, files)
    if files.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For who connects to another process of the cluster, as `INTERNAL_NAME`. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, files)
    return context


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.cert, files.key, password="")  # an encrypted key would be asked for on the terminal
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"{files.cert} and {files.key} are no certificate and its key: {words(error)}.", field="security") from None
    if files.ca is not None:
        try:
            context.load_verify_locations(files.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{files.ca} is no authority: {words(error)}.", field="security") from None


def reloading_context(files: TlsFiles) -> ssl.SSLContext:
    """A `server_context` that is of the files as they are at each handshake. Raises `ConfigError`."""
    certificates = Certificates(files)

    def renewed(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        certificates.refresh()
        connection.context = certificates.context

    first = certificates.context
    first.sni_callback = renewed  # called for every ClientHello, whether it names a server or not
    return first

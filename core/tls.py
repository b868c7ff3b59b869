"""TLS from files that may be replaced while they are in use: what is read is checked whole, and what cannot be used changes nothing."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .security import TlsFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pems:
    """What `TlsFiles` hold."""

    cert: bytes
    key: bytes
    ca: bytes | None


class Watched:
    """Files and what was last read from them: as `pems`, and as a server's `context`. Used by any thread."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises `ConfigError` if they are not a certificate, its key and an authority."""
        self.files = files
        self._seen = _signature(files)
        self.pems, self.context = _read(files)
        self._looking = threading.Lock()

    def refresh(self) -> bool:
        """Whether they have changed since the last look, and are good. Half a change is none: certificate and key must fit each other."""
        with self._looking:
            found = _signature(self.files)
            if found == self._seen:
                return False
            self._seen = found
            try:
                self.pems, self.context = _read(self.files)
            except ConfigError as error:
                log.error("%s What was read before stays in use.", error.message)
                return False
        log.info("certificate %s read again", self.files.cert)
        return True


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


def _signature(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a file does; a link is followed, which is how Kubernetes replaces a mounted secret."""
    return tuple(_stat(path) for path in files.all)


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


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
        raise ConfigError(f"{files.cert} and {files.key} are no certificate and its key: {_words(error)}.", field="security") from None
    if files.ca is not None:
        try:
            context.load_verify_locations(files.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{files.ca} is no authority: {_words(error)}.", field="security") from None


def _words(error: OSError | ValueError) -> str:
    return (getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)).rstrip(".")


def reloading_context(files: TlsFiles) -> ssl.SSLContext:
    """A `server_context` that is of the files as they are at each handshake. Raises `ConfigError`."""
    watched = Watched(files)

    def renewed(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        watched.refresh()
        connection.context = watched.context

    first = watched.context
    first.sni_callback = renewed  # called for every ClientHello, whether it names a server or not
    return first

"""Certificates for a cluster: an authority of its own, and what it signs. `diptych certs` writes them; `up` makes one that it forgets."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...core.errors import ConfigError
from ...core.security import INTERNAL_NAME, TlsFiles

EARLIER = timedelta(hours=1)
"""How long before now a certificate begins: clocks of hosts differ."""
CA, CA_KEY = "ca.pem", "ca.key"


@dataclass(frozen=True, slots=True)
class Authority:
    """Who signs. P-256 throughout: small, fast to sign with, and every TLS library has it."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, name: str, *, days: float) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
            key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = _builder(subject, subject, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(usage, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def read(cls, directory: Path) -> Authority:
        """That of an earlier `diptych certs`. Raises `ConfigError` if it cannot be read."""
        try:
            cert = x509.load_pem_x509_certificate((directory / CA).read_bytes())
            key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"The authority in {directory} cannot be read: {error}.", field="out") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != cert.public_key():
            raise ConfigError(f"{directory / CA_KEY} is not the key of {directory / CA}.", field="out")
        return cls(cert, key)

    def write(self, directory: Path) -> None:
        """`ca.pem`, and its key."""
        _write(directory / CA, _pem(self.cert), secret=False)
        _write(directory / CA_KEY, _key_pem(self.key), secret=True)

    def write_leaf(self, directory: Path, stem: str, names: Sequence[str], *, days: float, authority_file: str | None = None) -> TlsFiles:
        """A certificate for `names` (DNS names and addresses), good for both ends of a connection: `stem`.pem and `stem`.key.

        With `authority_file` the authority's own certificate is written under that name too, and is part of what is returned.
        """
        cert, key = self._leaf(names, days)
        files = TlsFiles(directory / f"{stem}.pem", directory / f"{stem}.key", directory / authority_file if authority_file else None)
        if files.ca is not None:
            _write(files.ca, _pem(self.cert), secret=False)
        _write(files.key, _key_pem(key), secret=True)
        _write(files.cert, _pem(cert), secret=False)
        return files

    def _leaf(self, names: Sequence[str], days: float) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = _builder(_name(names[0]), self.cert.subject, key.public_key(), days)
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True).add_extension(
            both, critical=False
        )
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return builder.add_extension(ours, critical=False).sign(self.key, hashes.SHA256()), key


def write_all(directory: Path, hosts: Sequence[str], *, days: float) -> list[str]:
    """What `diptych certs` does: an authority, unless there is one already, and for the cluster's processes and its router a certificate
    each, replacing those that are there. Returns what there is now, a line each."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = (directory / CA).exists() or (directory / CA_KEY).exists()
    authority = Authority.read(directory) if known else Authority.new("Diptych", days=max(days, CA_DAYS))
    if not known:
        authority.write(directory)
    authority.write_leaf(directory, "internal", [INTERNAL_NAME], days=days)
    authority.write_leaf(directory, "server", list(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])), days=days)
    return [
        f"{directory / CA}  the authority{' (kept)' if known else ''}; its key, {CA_KEY}, belongs on no server",
        f"{directory / 'internal.pem'}, internal.key  for security.internal_tls, until {_end(days)}",
        f"{directory / 'server.pem'}, server.key  for security.tls, until {_end(days)}",
    ]


CA_DAYS = 3650


def _end(days: float) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).date().isoformat()


def _builder(subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, days: float) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - EARLIER).not_valid_after(now + timedelta(days=days))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write(path: Path, content: bytes, *, secret: bool) -> None:
    """At once, so that who reads meanwhile has all of the old one or of the new one."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)
    draft.replace(path)

"""Certificates in files: what is replaced is taken, what is broken or half replaced is not."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from certificates import Issued
from diptych.core.errors import ConfigError
from diptych.core.security import TlsFiles
from diptych.core.tls import Certificates, client_context, reloading_context, server_context


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    return Issued.below(tmp_path / "ca")


def serial(context: ssl.SSLContext, trusts: Path) -> str:
    """Of the certificate that a client is shown."""
    trusting = ssl.create_default_context(cafile=trusts)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            connection, _ = listener.accept()
            with context.wrap_socket(connection, server_side=True):
                pass

        served = pool.submit(serve)
        with socket.create_connection(listener.getsockname()) as plain, trusting.wrap_socket(plain, server_hostname="localhost") as secure:
            shown = secure.getpeercert()
        served.result(10)
    assert shown is not None
    return str(shown["serialNumber"])


def replaced(old: TlsFiles, new: TlsFiles) -> None:
    """As a rotation does it: one file after the other, each at once."""
    for path, by in ((old.key, new.key), (old.cert, new.cert)):
        draft = path.with_suffix(".draft")
        shutil.copy(by, draft)
        draft.replace(path)


def test_a_changed_certificate_is_shown_from_the_next_handshake_on(issued: Issued) -> None:
    files = issued.public()
    context = reloading_context(files)
    first = serial(context, issued.ca)
    assert serial(context, issued.ca) == first
    replaced(files, issued.public("next"))
    second = serial(context, issued.ca)
    assert second != first
    assert serial(context, issued.ca) == second


def test_half_a_change_is_none_and_the_whole_one_is_taken_later(issued: Issued) -> None:
    files, following = issued.internal(), issued.internal("next")
    certificates = Certificates(files)
    before = certificates.pems
    os.replace(following.key, files.key)
    assert not certificates.refresh()
    assert certificates.pems is before
    os.replace(following.cert, files.cert)
    assert certificates.refresh()
    assert certificates.pems.cert != before.cert
    assert not certificates.refresh()


@pytest.mark.parametrize("broken", ["cert", "key", "ca"])
@pytest.mark.parametrize("how", ["missing", "garbage", "empty"])
def test_files_that_cannot_be_used_change_nothing_and_are_named_at_the_start(issued: Issued, broken: str, how: str) -> None:
    files = issued.internal()
    certificates = Certificates(files)
    path: Path = getattr(files, broken)
    path.unlink()
    if how != "missing":
        path.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n" if how == "garbage" else "")
    assert not certificates.refresh()
    with pytest.raises(ConfigError, match=path.name):
        Certificates(files)


def test_a_key_with_a_password_is_refused_and_asks_nobody_for_it(issued: Issued) -> None:
    from cryptography.hazmat.primitives import serialization

    files = issued.internal()
    encryption = serialization.BestAvailableEncryption(b"secret")
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(ConfigError):
        server_context(files)


def test_a_process_of_the_cluster_is_known_by_its_name_and_asks_for_the_others(issued: Issued) -> None:
    files = issued.internal()
    assert client_context(files).check_hostname
    assert client_context(files).verify_mode is server_context(files).verify_mode is ssl.CERT_REQUIRED
    assert server_context(issued.public()).verify_mode is ssl.CERT_NONE

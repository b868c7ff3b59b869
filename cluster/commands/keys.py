"""`diptych keys` and `diptych certs`: the files by which a cluster knows who comes. They are read again when they change: a key or a
certificate is good, or no longer, without a restart."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from ...core.api_keys import ApiKey, ApiKeyFile, new_key, now
from ...core.errors import ConfigError

keys_app = typer.Typer(no_args_is_help=True, help="API keys: make one, list them, take one back. A running router notices by itself.")

File = Annotated[Path, typer.Option("--file", "-f", help="The file that security.api_keys names.")]


@keys_app.command("new")
def new(tenant: Annotated[str, typer.Option("--tenant", help="Whose requests they are: tenants share no cache.")], file: File) -> None:
    """Make a key and print it, this once: the file has only its hash. For a tenant that has keys it is one more."""
    try:
        key, kept = new_key(tenant)
    except ValidationError:
        raise ConfigError(f"{tenant!r} is no tenant's name: letters, digits, dots, _ and -, 63 at most.", field="tenant") from None
    with _changing(file) as known:
        known.append(kept)
    typer.echo(key)


@keys_app.command("list")
def show(file: File) -> None:
    """Every key's id, tenant, when it was made and whether it is still good."""
    for key in _read(file):
        typer.echo(f"{key.id}  {key.tenant}  made {key.created}  {f'revoked {key.revoked}' if key.revoked else 'good'}")


@keys_app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="As `diptych keys list` shows it.")], file: File) -> None:
    """Take a key back: from the next request on it is none. What runs with it ends as it would have."""
    with _changing(file) as known:
        found = [index for index, key in enumerate(known) if key.id == key_id]
        if not found:
            raise ConfigError(f"{file} has no key {key_id!r}; `diptych keys list --file {file}` shows them.", field="id")
        known[found[0]] = known[found[0]].model_copy(update={"revoked": now()})
    typer.echo(f"{key_id} is revoked.")


def _read(file: Path) -> tuple[ApiKey, ...]:
    try:
        return ApiKeyFile.model_validate_json(file.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.", field="file") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"])) or "it"
        raise ConfigError(f"{file} is not what `diptych keys` writes ({where}).", field="file") from None


@contextmanager
def _changing(file: Path) -> Iterator[list[ApiKey]]:
    """The keys, written back at once at the end; of two who change them at the same time one waits."""
    try:
        lock = os.open(file.absolute().parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.", field="file") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(_read(file)) if file.exists() else []
        yield keys
        _replace(file, ApiKeyFile(keys=tuple(keys)).model_dump_json(indent=1) + "\n")
    finally:
        os.close(lock)


def _replace(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.", field="file") from None


def certs(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write them.")],
    host: Annotated[list[str] | None, typer.Option(help="A name or address by which clients call the router; may be repeated.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long they are good.")] = 365,
) -> None:
    """Make certificates: an authority, one for the cluster's processes and one for its router.

    Run again, with the same directory, it keeps the authority and renews the other two; what runs takes them at once.
    """
    from ..process.certs import write_all

    for line in write_all(out, host or [], days=days):
        typer.echo(line)

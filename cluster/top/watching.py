"""What `diptych top` does: looks at a router's metrics now and then, and shows what they say."""

from __future__ import annotations

import json
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ...core.access import Access
from ...core.errors import DiptychError, NotFound, Unauthenticated, Unavailable
from ..load.slo import Slo
from .picture import Picture, picture
from .scraped import NOTHING, Change, Scrape, parse
from .tables import draw

WINDOW_S = 60.0
"""Rates and latencies are those of so long."""
ANSWER_S = 5.0
WIDTH = 160


def _client(server: str, access: Access) -> httpx.Client:
    return httpx.Client(base_url=f"{access.scheme}://{server}", headers=access.headers, verify=access.ca or True, timeout=ANSWER_S)


def _look(client: httpx.Client) -> Scrape:
    """Raises `DiptychError` if nobody answers, or not a router of ours."""
    try:
        answer = client.get("/metrics")
        if answer.status_code in (401, 403):
            raise Unauthenticated(f"{client.base_url} wants an API key for /metrics: give --api-key (or DIPTYCH_API_KEY).")
        answer.raise_for_status()
        scrape = parse(answer.text, time.monotonic())
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"{client.base_url} does not tell its metrics: {error}") from None
    if not list(scrape.of("diptych_requests_running")):
        raise NotFound(f"{client.base_url} is not a router of Diptych: its metrics have no diptych_requests_running.")
    return scrape


def _console() -> Console:
    """As wide as the terminal; where there is none, wide enough for every column."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def show(server: str, access: Access, slo: Slo, *, as_json: bool) -> None:
    """One picture, since the router started. Raises `DiptychError` if `server` does not tell its metrics."""
    with _client(server, access) as client:
        seen = picture(Change(NOTHING, _look(client)), slo)
    if as_json:
        print(json.dumps(seen.as_json(), indent=1))
    else:
        _console().print(draw(seen, server))


def watch(server: str, access: Access, slo: Slo, every: float, *, as_json: bool) -> None:
    """A picture `every` so many seconds, until q is typed. Raises as `show` at the first; later it tries again."""
    with _client(server, access) as client:
        watched = _Watched(client, server, slo)
        with _Screen(as_json) as screen, _keys() as keys:
            while True:
                screen.show(watched.as_line() if as_json else watched.drawn())
                if keys.quit_within(every):
                    return
                watched.look()


class _Watched:
    """A router, looked at again and again; what it said a minute ago is what changes are counted from."""

    def __init__(self, client: httpx.Client, server: str, slo: Slo) -> None:
        self._client, self._server, self._slo = client, server, slo
        self._looks: deque[Scrape] = deque([_look(client)])
        self._error: DiptychError | None = None

    def look(self) -> None:
        try:
            self._looks.append(_look(self._client))
            self._error = None
        except DiptychError as error:
            self._error = error
            return
        while self._looks[-1].at - self._looks[1].at >= WINDOW_S:
            self._looks.popleft()

    @property
    def _seen(self) -> Picture:
        return picture(Change(self._looks[0] if len(self._looks) > 1 else NOTHING, self._looks[-1]), self._slo)

    def as_line(self) -> str:
        return json.dumps({"error": self._error.message} if self._error else self._seen.as_json())

    def drawn(self) -> RenderableType:
        seen = draw(self._seen, self._server)
        if self._error is None:
            return seen
        return Group(Text(f"{self._error.message} Trying again; below is what was last seen.", style="bold red"), seen)


class _Screen:
    """Where the pictures go: one in place of another on a terminal, else one after another."""

    def __init__(self, lines: bool) -> None:
        self._console = _console()
        self._live = None if lines or not self._console.is_terminal else Live(console=self._console, screen=True, auto_refresh=False)

    def __enter__(self) -> _Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, what: RenderableType) -> None:
        if self._live:
            self._live.update(what, refresh=True)
        elif isinstance(what, str):
            print(what, flush=True)
        else:
            self._console.print(what)


class _Keys:
    """What is typed, if somebody can type."""

    def __init__(self, listening: bool) -> None:
        self._listening = listening

    def quit_within(self, seconds: float) -> bool:
        """Wait so long; True as soon as q is typed."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([sys.stdin] if self._listening else [], [], [], left)
            if ready:
                typed = sys.stdin.read(1)
                self._listening = bool(typed)
                if typed in ("q", "Q", "\x03"):
                    return True
        return False


@contextmanager
def _keys() -> Iterator[_Keys]:
    """Keys come one by one, unseen; Ctrl-C still ends the command. The terminal is as it was afterwards."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield _Keys(False)
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _Keys(True)
    except KeyboardInterrupt:
        return
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

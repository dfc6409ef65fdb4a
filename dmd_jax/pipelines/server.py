"""The web page of `python -m dmd_jax.stream`: its file, its downloads and its websocket.

    /            the page
    /video.mp4   what was shown of the last video; /video.gif too
    /healthz     200 once the player has compiled, 503 before
    /socket      messages of `Player`, as JSON, and frames

Imports `player`, and websockets: `pip install 'dmd_jax[stream]'`.
"""

import contextlib
import http
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dmd_jax.pipelines.player import Player

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST = 4096  # bytes of a message from the page
TYPES = {".mp4": "video/mp4", ".gif": "image/gif"}


def import_websockets() -> Any:
    """websockets' threaded server. Raises ImportError if it is not installed."""
    try:
        from websockets.sync import server
    except ImportError as error:
        raise ImportError("the page needs websockets: pip install 'dmd_jax[stream]'") from error
    return server


def serve(player: Player, host: str, port: int, *, title: str, fps: float) -> Any:
    """A server of the page; call its `serve_forever`, and `shutdown` from another thread.

    Args:
        player: a Player; it is not started here.
        host, port: where to listen; port 0 is a free one.
        title: name of the student.
        fps: frames per second at which the page shows them.

    Raises:
        ImportError: websockets is not installed.
        OSError: the address is in use.
    """
    site = _Site(player, host in LOOPBACK, dict(type="hello", title=title, fps=fps))
    return import_websockets().serve(
        site.converse,
        host,
        port,
        process_request=site.respond,
        max_size=LONGEST,
        max_queue=64,
        compression=None,  # frames are compressed
        close_timeout=2,
    )


class _Site:
    def __init__(self, player, loopback, hello):
        self._player, self._loopback = player, loopback
        self._hello = hello | {"formats": _formats()}
        self._viewer, self._lock = None, threading.Lock()

    # Pages and files.

    def respond(self, connection, request):
        """The answer to an HTTP request; None where it is for the websocket."""
        path = urlsplit(request.path).path
        if reason := self._foreign(request.headers):
            return connection.respond(http.HTTPStatus.FORBIDDEN, reason + "\n")
        if path == "/socket":
            return None
        if path == "/":
            return _answer(connection, PAGE.read_bytes(), "text/html; charset=utf-8")
        if path == "/healthz":
            up = self._player.state["state"] in ("ready", "playing")
            status = http.HTTPStatus.OK if up else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, self._player.state["state"] + "\n")
        suffix = path.removeprefix("/video")
        if path.startswith("/video") and suffix in TYPES:
            return self._download(connection, suffix)
        return connection.respond(http.HTTPStatus.NOT_FOUND, "there is no such page\n")

    def _foreign(self, headers):
        """Why a request is refused: other sites must not use a server on the viewer's machine."""
        host = headers.get("Host", "")
        if self._loopback and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return f"this server is for {', '.join(LOOPBACK)} only, not {host}"
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"a page of {origin} may not use this server"
        return ""

    def _download(self, connection, suffix):
        try:
            body = self._player.download(suffix)
        except (ValueError, ImportError) as error:
            return connection.respond(http.HTTPStatus.CONFLICT, f"{error}\n")
        answer = _answer(connection, body, TYPES[suffix])
        answer.headers["Content-Disposition"] = f'attachment; filename="video{suffix}"'
        return answer

    # The websocket.

    def converse(self, connection):
        """Serves one page until it closes; a page that was open before is closed."""
        from websockets.exceptions import ConnectionClosed

        def send(message):
            with contextlib.suppress(ConnectionClosed):  # `detach` follows
                connection.send(message if isinstance(message, bytes) else json.dumps(message))

        with self._lock:
            before, self._viewer = self._viewer, connection
        if before is not None:
            before.close(4000, "opened in another page")
        send(self._hello)
        self._player.attach(send)
        try:
            for message in connection:
                if reason := _obey(self._player, message):
                    send(dict(type="refused", id=0, reason=reason))
        finally:
            self._player.detach(send)
            with self._lock:
                if self._viewer is connection:
                    self._viewer = None


def _answer(connection, body, content_type):
    answer = connection.respond(http.HTTPStatus.OK, "")
    del answer.headers["Content-Type"], answer.headers["Content-Length"]
    answer.headers["Content-Type"] = content_type
    answer.headers["Content-Length"] = str(len(body))
    answer.headers["Cache-Control"] = "no-store"
    answer.body = body
    return answer


def _formats():
    """The formats of a download; MP4 needs PyAV."""
    return ["mp4", "gif"] if importlib.util.find_spec("av") else ["gif"]


def _obey(player, message):
    """Does what a message of the page says; returns why it is refused, or None."""
    try:
        given = json.loads(message)
        kind = given["type"]
        if kind == "play":
            player.play(_prompt(given), _integer(given, "seed"))
        elif kind == "prompt":
            player.ask(_integer(given, "id"), _prompt(given))
        elif kind == "shown":
            player.shown(_integer(given, "video"), _integer(given, "frames"))
        elif kind == "reset":
            player.reset()
        else:
            raise ValueError(f"there is no message of type {kind!r}")
    except (ValueError, TypeError, KeyError) as error:
        return f"a message was not understood: {error}"
    return None


def _prompt(given):
    if not isinstance(given["prompt"], str):
        raise ValueError("prompt must be a text")
    return given["prompt"].strip()


def _integer(given, name):
    number = given[name]
    if type(number) is not int or not 0 <= number < 2**32:
        raise ValueError(f"{name}={number!r} must be an integer from 0 to {2**32 - 1}")
    return number

"""The door of a local page: who is answered, and which routes are open.

A page on the loopback address is reached by more than its user: by every site that is open in the
same browser, also under a name of its own that it lets point to 127.0.0.1 (DNS rebinding), and by
other users of the machine. So a request must name the page's own host, come from the page itself,
ask for something that the page uses, and have the key of this session.
"""

import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY_BYTES = 24  # of chance in a session's key
# What gradio's page asks for as it is opened, at each button and until it is closed.
_OPEN = {
    "GET": re.compile(
        r"/|/(assets|static)/(?!.*\.\.).+|/favicon\.ico|/manifest\.json|(/gradio_api)?/theme\.css|/config|"
        r"/gradio_api/(info|app_id|startup-events|queue/data|heartbeat/[^/]+)"
    ),
    "HEAD": re.compile("/"),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel|reset)"),
}
# Gradio asks its own page for this before anybody has the key, and learns only that it is there.
_WITHOUT_KEY = ("/gradio_api/startup-events",)
_HEADERS = {
    "content-security-policy": "frame-ancestors 'none'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class PageGuard:
    """An ASGI application that passes on what comes from the page's own user, and nothing else.

    The key stands in the address that is printed. Whoever opens that gets it as a cookie, which the
    browser sends from the page itself only.
    """

    def __init__(self, app: "ASGIApp", key: str):
        self.app, self.key = app, key

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page opens no websocket
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self._refusal(scope)
        if refusal is not None:
            return await _answer(send, *refusal)

        # Whoever came by the printed address needs no key in what follows
        added = _HEADERS
        if self._asked_with_key(scope):
            cookie = f"{_cookie(scope)}={self.key}; Path=/; HttpOnly; SameSite=Strict"
            added = _HEADERS | {"set-cookie": cookie, "cache-control": "no-store"}

        async def send_with_headers(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_encoded(added)]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: "Scope") -> tuple[int, str] | None:
        """Return why a request is not answered, as a status and words; None if it is."""
        # The name that the browser was given, and the page that asks
        port = scope["server"][1]
        own = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        hosts, origins = _headers(scope, "host"), _headers(scope, "origin")
        if len(hosts) != 1 or hosts[0] not in own:
            return 403, f"This page answers as 127.0.0.1:{port} alone."
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return 403, "This page answers no other page."

        # What the page does not use is not there
        method, path = scope["method"], scope["path"]
        if method not in _OPEN:
            return 405, "This page does not use that method."
        if not _OPEN[method].fullmatch(path):
            return 404, "This page does not use that route."

        if path in _WITHOUT_KEY or self._asked_with_key(scope) or self._has_cookie(scope):
            return None
        return 401, "Open the address that goose-lora has printed, with its key."

    def _asked_with_key(self, scope: "Scope") -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [])
        return scope["path"] == "/" and any(self._is_key(key) for key in given)

    def _has_cookie(self, scope: "Scope") -> bool:
        for header in _headers(scope, "cookie"):
            try:
                morsel = SimpleCookie(header).get(_cookie(scope))
            except CookieError:
                continue
            if morsel is not None and self._is_key(morsel.value):
                return True
        return False

    def _is_key(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


def _cookie(scope: "Scope") -> str:
    # Browsers keep cookies by name of the host, whatever its port: two pages need two names
    return f"goose_lora_{scope['server'][1]}"


def _headers(scope: "Scope", name: str) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.decode("latin-1") == name]


async def _answer(send: "Send", status: int, words: str) -> None:
    headers = _encoded(_HEADERS | {"content-type": "text/plain; charset=utf-8"})
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{words}\n".encode()})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def guarded_by(key: str) -> Callable[["Starlette"], object]:
    """Return a lifespan for an application that puts ``PageGuard`` around all that it has.

    Middleware would stand inside gradio's own, which answers preflights itself.
    """

    @asynccontextmanager
    async def lifespan(app: "Starlette") -> AsyncIterator[None]:
        # The stack is made before the lifespan begins, and looked up at each request
        assert app.middleware_stack is not None
        app.middleware_stack = PageGuard(app.middleware_stack, key)
        yield

    return lifespan

"""Serve the app: on this machine only, unless a person says otherwise, and then with a password."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from apps.web.site import RECIPES, Site

if TYPE_CHECKING:
    from apps.web.page import App

LOCAL = "127.0.0.1"
MAX_UPLOAD = "4mb"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "frame-src 'self' data: blob:; object-src 'none'; form-action 'self'; frame-ancestors 'self'"
)
_FILE = re.compile(r"^/(?:gradio_api/)?file[=/](?P<path>.*)$", re.DOTALL)
_FORBIDDEN = re.compile(r"^/(?:gradio_api/)?(?:proxy=|deep_link|monitoring)")


@dataclass(frozen=True)
class Serving:
    """Where the app can be reached. `listen` beyond this machine and `share` need `user`."""

    port: int | None = None
    listen: str = LOCAL
    share: bool = False
    user: tuple[str, str] | None = None

    @property
    def open(self) -> bool:
        return self.share or self.listen != LOCAL


def credentials(path: Path | None) -> tuple[str, str]:
    """User and password from a file with one line `user:password`, or new ones.

    Raises:
        ValueError: the file is not of this form.
    """
    if path is None:
        return "accel", secrets.token_urlsafe(12)
    user, colon, password = path.read_text("utf-8").strip().partition(":")
    if not colon or not user or len(password) < 8 or "\n" in password:
        raise ValueError(f"{path} must hold one line user:password, of at least 8 letters")
    return user, password


def prepare(site: Site) -> None:
    """Make the output folder and keep Gradio's own files, and its thoughts, at home."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(site.out / ".gradio")
    (site.out / RECIPES).mkdir(parents=True, exist_ok=True)


def serve(
    site: Site, serving: Serving, ready: Callable[[str, str | None], None] = lambda *_: None
) -> None:
    """Run the app until it is interrupted. `ready(address, public address)` is called once.

    Raises:
        ValueError: reachable from outside without a user.
        OSError: the port is taken.
    """
    if serving.open and serving.user is None:
        raise ValueError("an app that others can reach needs a user and a password")
    prepare(site)
    from apps.web.page import CSS, SCRIPT, App, build, theme

    app = App(site)
    app.device.start()
    blocks = build(app)
    blocks.queue(default_concurrency_limit=8, max_size=256, api_open=False)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        _, local, public = blocks.launch(
            server_name=serving.listen,
            server_port=serving.port,
            share=serving.share,
            auth=serving.user,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            inbrowser=False,
            allowed_paths=[str(site.out)],
            max_file_size=MAX_UPLOAD,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            theme=theme(),
            css=CSS.read_text("utf-8"),
            head=f"<script>{SCRIPT.read_text('utf-8')}</script>",
            app_kwargs={"middleware": [_middleware(site, serving)]},
        )
        ready(local, public)
        threading.Thread(target=_warm, args=(app,), daemon=True).start()
        while not stop.wait(0.5):
            pass
    finally:
        app.close()
        blocks.close(verbose=False)


def _warm(app: App) -> None:
    """Import what the first click needs, and load the first model for checks."""
    from apps.web.imports import once
    from apps.web.models import asks
    from apps.web.site import Refused

    once()
    try:
        asks(app.site.models[0])
        app.checks.problem(app.site.models[0], [])
    except (Refused, ValueError, OSError):
        return  # the page says so


def _middleware(site: Site, serving: Serving) -> Any:
    from starlette.middleware import Middleware

    return Middleware(Guard, site=site, local_only=not serving.open)


class Guard:
    """Before Gradio: only known hosts, only this app's page, only finished media, no errands.

    Gradio takes uploads from the page of any other site, in the name of who is logged in here.
    """

    def __init__(self, app: Any, site: Site, local_only: bool) -> None:
        self._app, self._site, self._local_only = app, site, local_only

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._local_only and not _is_local(host):
            return 421, "This app answers to localhost only."
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            return 403, "This app answers to its own page only."
        path = unquote(scope["path"])
        if _FORBIDDEN.match(path):
            return 403, "Not served here."
        found = _FILE.match(path)
        if found is None or self._may_serve(found["path"]):
            return None
        return 403, "Only finished pictures and videos of the output folder are served."

    def _may_serve(self, path: str) -> bool:
        """Media below the output folder, and the copies that Gradio made for this page."""
        if not path.startswith("/") or "\0" in path:
            return False
        own = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
        return self._site.serves(path) or Path(path).resolve().is_relative_to(own)


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name in ("localhost", LOCAL, "[::1]")


def _with_headers(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message["headers"],
                (b"content-security-policy", POLICY.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
            ]
        await send(message)

    return sending


async def _refuse(send: Callable[[Any], Awaitable[None]], status: int, words: str) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": words.encode()})

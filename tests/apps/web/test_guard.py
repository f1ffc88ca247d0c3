"""What stands before Gradio lets through, and what not; without a server."""

import asyncio

import pytest

from apps.web.server import Guard
from apps.web.site import Site


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`ask(path, host, local_only, origin)`: the status of an answer, 200 if it came through."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / ".gradio"))
    site = Site(tmp_path, (), ())

    def status(path, host="localhost:7860", local_only=True, origin=None):
        sent = []

        async def inner(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message):
            sent.append(message)

        headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
        scope = {"type": "http", "path": path, "headers": headers}
        asyncio.run(Guard(inner, site, local_only)(scope, None, send))
        return sent[0]["status"], dict(sent[0]["headers"])

    return status


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:7860", "[::1]:7860"])
def test_this_machine_is_answered(ask, host):
    assert ask("/", host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "10.0.0.1:7860"])
def test_other_names_are_not_unless_it_listens(ask, host):
    assert ask("/", host)[0] == 421
    assert ask("/", host, local_only=False)[0] == 200


@pytest.mark.parametrize("local_only", [True, False])
def test_pages_of_other_sites_may_not_ask(ask, local_only):
    for origin in ("http://evil.example", "null", "http://localhost", "http://localhost:7861"):
        assert ask("/gradio_api/upload", local_only=local_only, origin=origin)[0] == 403, origin
    own = ask("/gradio_api/upload", local_only=local_only, origin="http://localhost:7860")
    assert own[0] == 200


def test_files(ask, tmp_path):
    (tmp_path / "a.png").touch()
    assert ask(f"/gradio_api/file={tmp_path}/a.png")[0] == 200
    assert ask(f"/gradio_api/file={tmp_path}/.gradio/x.zip")[0] == 200
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={tmp_path}/ledger.sqlite",
        f"/gradio_api/file={tmp_path}/.gradio/../../etc/passwd",
        "/gradio_api/file=https://example.com/a.png",
        f"/file/{tmp_path}/../x.png\0",
        "/gradio_api/proxy=https://example.com",
        "/gradio_api/deep_link",
        "/monitoring",
    ):
        assert ask(path)[0] == 403, path


def test_the_page_may_ask_nobody_else(ask):
    policy = ask("/")[1][b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy

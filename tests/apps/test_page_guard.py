"""Local pages over HTTP: their own user is answered, and nobody else is, whatever name, origin,
route or key a request comes with. Nothing is written for them."""

import http.client
import json
from urllib.parse import urlsplit

import pytest

from goose_lora.apps import chat_page, gradio_pages, label_page
from goose_lora.apps.label import LabelQueue
from goose_lora.apps.label_file import ChoiceFile
from goose_lora.apps.session import RunInfo, SampledReply
from goose_lora.files import read_jsonl

JOIN = "/gradio_api/queue/join"


class Page:
    """A page that is served, what it has been made to do, and a browser's requests to it."""

    def __init__(self, blocks, done, button, inputs):
        self.blocks, self.done, self.button, self.inputs = blocks, done, button, inputs
        self.address = gradio_pages.open_page(blocks, port=None)
        self.port = urlsplit(self.address).port
        self.own = f"127.0.0.1:{self.port}"
        status, headers, _ = self.ask("GET", "/?" + urlsplit(self.address).query)
        assert status == 200
        self.cookie = headers["set-cookie"].split(";")[0]

    def ask(self, method, path, body=None, hosts=None, **headers):
        """Send a request as it is given, with any number of Host headers; return what came back."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        for host in [self.own] if hosts is None else hosts:
            connection.putheader("Host", host)
        sent = b"" if body is None else json.dumps(body).encode()
        if body is not None:
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(sent)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(sent)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def write(self, **changes):
        """Press a button: the first pair is chosen, or a line is asked. Returns the status."""
        body = {"data": self.inputs(), "fn_index": self.button, "session_hash": "abc", "trigger_id": None}
        given = {"Cookie": self.cookie, "Origin": f"http://{self.own}"} | changes
        return self.ask("POST", JOIN, body, **{name: value for name, value in given.items() if value})[0]


def reply(text):
    return SampledReply(text, 2, True, None)


class Session:
    """Answers, and notes what it was asked."""

    def __init__(self, asked):
        self.info = RunInfo("run", None, None, {"ppo": "policy"}, None, None, False, {})
        self.info.describe = lambda names: "a run"
        self.asked = asked

    def reply(self, name, prompt, *, seed, write):
        self.asked.append(prompt)
        write("hm")
        return [reply("hm")]


def label(folder):
    file = folder / "pairs.jsonl"
    pairs = LabelQueue(
        ["a", "b", "c"],
        lambda number: (reply(f" left {number}"), reply(f" right {number}")),
        ChoiceFile(file),
        policy="p1",
    )
    blocks = label_page.build_label_page(pairs, title="t")

    def done():
        return len(read_jsonl(file)) if file.exists() else 0

    return Page(blocks, done, 2, lambda: ["me", pairs.next("me").key])


def chat(folder):
    asked = []
    blocks = chat_page.build_chat_page(Session(asked), ["ppo"], seed=0)
    return Page(blocks, lambda: len(asked), 0, lambda: ["ba", None])


@pytest.fixture(scope="module", params=[label, chat], ids=["label", "chat"])
def page(request, tmp_path_factory):
    made = request.param(tmp_path_factory.mktemp("page"))
    yield made
    made.blocks.close(verbose=False)


def is_refused(page, status):
    return 400 <= status < 500 and page.done() == 0


HOSTS = ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", "0.0.0.0:{port}"]
HOSTS += [
    "localhost.evil.example:{port}",
    "127.0.0.1:{port}.evil.example",
    "[::1]:{port}",
    "127.1:{port}",
    "",
    "127.0.0.1.:{port}",
    "localhost.:{port}",
    "127.0.0.1:{port}@evil.example",
    "evil.example#127.0.0.1:{port}",
    "[::ffff:127.0.0.1]:{port}",
    "2130706433:{port}",
    "127.0.0.1:0{port}",
    "127.0.0.1:{port}, evil.example",
]
ORIGINS = ["http://evil.example", "http://evil.example:{port}", "null", "http://127.0.0.1:1", "file://"]
ORIGINS += [
    "https://127.0.0.1:{port}",
    "http://localhost:{port}",
    "http://127.0.0.1:{port}.evil.example",
    " ",
]


@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_host_is_refused_with_the_right_key_and_writes_nothing(page, host):
    host = host.format(port=page.port)
    given = {"hosts": [host], "Cookie": page.cookie, "Origin": f"http://{host}"}
    for method, path in (("GET", "/"), ("GET", "/?" + urlsplit(page.address).query), ("GET", "/config")):
        assert page.ask(method, path, **given)[0] in (400, 403)
    assert is_refused(page, page.write(hosts=[host], Origin=f"http://{host}"))
    assert is_refused(page, page.write(hosts=[host], Origin=None))


@pytest.mark.parametrize("hosts", [[], ["evil.example", "{own}"], ["{own}", "evil.example"]])
def test_no_host_or_two_of_them_are_refused(page, hosts):
    assert is_refused(page, page.write(hosts=[host.format(own=page.own) for host in hosts] or [""]))


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_foreign_origin_is_refused_with_the_right_key_and_writes_nothing(page, origin):
    assert is_refused(page, page.write(Origin=origin.format(port=page.port)))


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "http://{own}"])
@pytest.mark.parametrize("path", ["/", JOIN, "/gradio_api/upload"])
def test_a_preflight_is_granted_nothing(page, origin, path):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    status, headers, _ = page.ask("OPTIONS", path, Origin=origin.format(own=page.own), **asked)
    assert is_refused(page, status) and not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("cookie", [None, "", "other=1", "goose_lora_{port}=guess", "goose_lora_{port}="])
def test_without_the_key_of_the_session_nothing_is_shown_or_written(page, cookie):
    cookie = cookie and cookie.format(port=page.port)
    assert is_refused(page, page.write(Cookie=cookie))
    given = {"Cookie": cookie} if cookie else {}
    for path in (
        "/",
        "/?key=guess",
        "/config",
        "/gradio_api/info",
        "/gradio_api/queue/data?session_hash=abc",
    ):
        status, headers, said = page.ask("GET", path, **given)
        assert status == 401 and b"Open the address that goose-lora has printed" in said
        assert "set-cookie" not in headers


ROUTES = [
    "POST /gradio_api/upload",
    "POST /upload",
    "POST /gradio_api/run/record",
    "POST /gradio_api/api/record",
]
ROUTES += [
    "POST /gradio_api/call/record",
    "POST /gradio_api/call/v2/record",
    "POST /gradio_api/process_recording",
]
ROUTES += ["POST /gradio_api/component_server", "POST /gradio_api/stream/x", "POST /gradio_api/vibe-edit"]
ROUTES += ["POST /login", "POST /gradio_api/run-history/connect", "POST /", "PUT /", "DELETE /", "PATCH /"]
ROUTES += ["GET /gradio_api/file=/etc/passwd", "GET /gradio_api/file/etc/passwd", "GET /monitoring"]
ROUTES += [
    "GET /gradio_api/proxy=http://127.0.0.1:1/",
    "GET /gradio_api/token",
    "GET /docs",
    "GET /openapi.json",
]
ROUTES += [
    "GET /gradio_api/deep_link",
    "GET /assets/../../routes.py",
    "GET /assets/%2e%2e/x",
    "GET /gradio_api/mcp/sse",
]
ROUTES += ["TRACE /", "PROPFIND /", "GET /gradio_api/upload_progress?upload_id=x", "GET /dev/reload"]


@pytest.mark.parametrize("route", ROUTES)
def test_routes_that_the_page_does_not_use_are_not_there_even_with_the_key(page, route):
    method, path = route.split()
    body = {} if method == "POST" else None
    status, _, said = page.ask(method, path, body, Cookie=page.cookie, Origin=f"http://{page.own}")
    assert status in (404, 405) and b"This page does not use that" in said and page.done() == 0


def test_the_key_comes_as_a_cookie_that_no_script_and_no_other_site_can_use(page):
    status, headers, _ = page.ask("GET", "/?" + urlsplit(page.address).query)
    assert status == 200 and headers["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Strict")
    assert headers["content-security-policy"] == "frame-ancestors 'none'", "no site can lay itself over it"
    status, headers, said = page.ask("GET", "/", Cookie=f"a=b; {page.cookie}")
    assert status == 200 and "set-cookie" not in headers
    assert urlsplit(page.address).query.removeprefix("key=").encode() not in said


def test_each_page_has_a_key_of_its_own(tmp_path):
    first, second = label(tmp_path), chat(tmp_path)
    try:
        assert first.cookie.split("=")[1] != second.cookie.split("=")[1]
        assert first.write(Cookie=second.cookie) == 401 and first.done() == 0
    finally:
        for page in (first, second):
            page.blocks.close(verbose=False)


def test_a_websocket_is_closed(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Cookie": page.cookie}
    connection.request("GET", "/gradio_api/queue/join", headers=upgrade)
    assert connection.getresponse().status >= 400
    connection.close()


def test_what_is_refused_to_others_is_granted_to_the_pages_own_user(page):
    """Last: the same request with the own Host, Origin and key is answered and written."""
    assert page.done() == 0
    assert page.write() == 200
    _, _, events = page.ask("GET", "/gradio_api/queue/data?session_hash=abc", Cookie=page.cookie)
    assert b"process_completed" in events and page.done() == 1
    localhost = f"localhost:{page.port}"
    assert page.write(hosts=[localhost], Origin=f"http://{localhost}") == 200

"""A server that answers as OpenAI's do at /v1/chat/completions, for judges; each test says how."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from goose_lora.rewards import pairwise_judge


def completion(text, **message):
    """What a server says with a text for an answer."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, **message},
    }
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def longer(body):
    """Prefer the longer reply, in whatever place."""
    asked = question(body)
    a, b = len(asked["reply_a"]), len(asked["reply_b"])
    return completion("tie" if a == b else "A" if a > b else "B")


def question(body):
    """The request and both replies, of the body that was sent."""
    return json.loads(body["messages"][-1]["content"])


class Served:
    """Address, port, questions and headers so far, and what is answered: ``says(body)`` returns a
    status and a content, which is JSON unless it is bytes."""

    def __init__(self):
        self.says, self.bodies, self.headers, self.url, self.port = longer, [], [], "", 0


@contextmanager
def judge_server(port=0):
    """A server at a port of the loopback, or at any that is free."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            served.bodies.append(body)
            served.headers.append(dict(self.headers))
            if self.path != "/v1/chat/completions":
                status, content = 404, b"404 page not found"
            else:
                status, content = served.says(body)
            kind = "text/html" if isinstance(content, bytes) else "application/json"
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(sent)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *words):
            """Say nothing."""

        def handle(self):
            try:
                super().handle()
            except ConnectionError:
                """Whoever asked has gone."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.port = server.server_port
    served.url = f"http://127.0.0.1:{served.port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def impatient_server(monkeypatch, *, retries):
    """A server for judges without a key, which ask it so many times again."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("FIRST_RETRIES", "ANSWER_RETRIES"):
        monkeypatch.setattr(pairwise_judge, name, retries)
    with judge_server() as served:
        yield served

# SPDX-License-Identifier: Apache-2.0
"""A chat-completions endpoint that misbehaves as the first part of the path says.

Run as a process; it prints its port and ends with its standard input. `GET /asked/<way>` tells
what was asked that way: `[[seconds, user's text, authorization], ...]`.
"""

import gzip
import json
import sys
import threading
import time
from collections import defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ASKED: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
LOCK = threading.Lock()
BIG = 4 << 20


def answer(text: Any, **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {
        "choices": [{"message": message, "finish_reason": "stop"} | changes],
        "usage": usage,
    }


class Rude(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.send(200, json.dumps(ASKED[self.path.rpartition("/")[2]]).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        way, text = self.path.split("/")[1], asked["messages"][-1]["content"]
        if asked["messages"][-1]["role"] == "assistant":
            text = asked["messages"][-2]["content"]
        with LOCK:
            ASKED[way].append((time.monotonic(), text, self.headers.get("Authorization", "")))
            before = sum(other == text for _, other, _ in ASKED[way]) - 1
        if text == "fine":
            self.say(answer("Fine."))
        else:
            getattr(self, f"way_{way}")(before, asked)

    def way_fine(self, before: int, asked: dict[str, Any]) -> None:
        self.say(answer(f"A reply to seed {asked['seed']}."))

    def way_working(self, before: int, asked: dict[str, Any]) -> None:
        time.sleep(0.1)
        self.way_fine(before, asked)

    def way_heard(self, before: int, asked: dict[str, Any]) -> None:
        self.say(answer(json.dumps(asked)))

    def way_goes_on(self, before: int, asked: dict[str, Any]) -> None:
        self.say(answer(" and on."))

    def way_obeys(self, before: int, asked: dict[str, Any]) -> None:
        told, seed = asked["messages"][-1]["content"], asked["seed"]
        if "begins with: " in told:
            self.say(answer(f"{told.partition('begins with: ')[2]} and then {seed}."))
        elif "like this, but " in told:
            self.say(answer(f'Here is one: "{told.partition(": ")[2]} {seed}"'))
        else:
            self.say(answer(f"Text {seed} is as good as any."))

    def way_parrots(self, before: int, asked: dict[str, Any]) -> None:
        self.say(answer(asked["messages"][-1]["content"].rpartition(": ")[2]))

    def way_repeats(self, before: int, asked: dict[str, Any]) -> None:
        self.say(answer("Always the same few words."))

    def way_refuses(self, before: int, asked: dict[str, Any]) -> None:
        self.say(answer("I'm sorry, but as an AI I cannot do that."))

    def way_status(self, before: int, asked: dict[str, Any]) -> None:
        status = int(asked["messages"][-1]["content"])
        error = {"message": f"you said {status}", "code": "some_code"}
        self.send(status, json.dumps({"error": error}).encode())

    def way_at_first(self, before: int, asked: dict[str, Any]) -> None:
        if before < 2:
            self.way_status(before, asked)
        else:
            self.way_fine(before, asked)

    def way_later(self, before: int, asked: dict[str, Any]) -> None:
        when = asked["messages"][-1]["content"]
        if before:
            self.way_fine(before, asked)
        else:
            date = formatdate(time.time() + 2, usegmt=True)
            self.send(429, b"", {"Retry-After": date if when == "a date" else when})

    def way_redirect(self, before: int, asked: dict[str, Any]) -> None:
        self.send(307, b"", {"Location": "/fine/v1/chat/completions"})

    def way_filter(self, before: int, asked: dict[str, Any]) -> None:
        kind = asked["messages"][-1]["content"]
        if kind == "status":
            self.send(400, json.dumps({"error": {"code": "content_filter"}}).encode())
        elif kind == "nothing":
            self.say(answer(None, finish_reason="length"))
        elif kind == "empty":
            self.say(answer(""))
        elif kind == "reason":
            self.say(answer("The first wo", finish_reason="content_filter"))
        else:
            message = {"role": "assistant", "content": None, "refusal": "I will not."}
            self.say(answer(None, message=message))

    def way_garbage(self, before: int, asked: dict[str, Any]) -> None:
        kinds: dict[str, bytes] = {
            "no body": b"",
            "a page": b"<html>Welcome</html>",
            "not UTF-8": json.dumps(answer("x")).encode().replace(b"x", b"\xff\xfe"),
            "a list": b"[1, 2]",
            "no choices": b'{"choices": []}',
            "no message": b'{"choices": [{"finish_reason": "stop"}]}',
            "a number": json.dumps(answer(7)).encode(),
            "far too long": json.dumps(answer("word " * 100_000)).encode(),
            "endless": json.dumps(answer("x" * BIG)).encode(),
            "cut off JSON": json.dumps(answer("x")).encode()[:-9],
            "deep": b"[" * 200_000,
            "packed": gzip.compress(json.dumps(answer("x")).encode()),
        }
        kind = asked["messages"][-1]["content"]
        extra = {"Content-Encoding": "gzip"} if kind == "packed" else {}
        self.send(200, kinds[kind], extra)

    def way_cut_off(self, before: int, asked: dict[str, Any]) -> None:
        if before:
            self.way_fine(before, asked)
        else:
            whole = json.dumps(answer("x" * 1000)).encode()
            self.send(200, whole[:100], {"Content-Length": str(len(whole))})
            self.close_connection = True

    def way_hangs_up(self, before: int, asked: dict[str, Any]) -> None:
        if before:
            self.way_fine(before, asked)
        else:
            self.close_connection = True

    def way_silent(self, before: int, asked: dict[str, Any]) -> None:
        time.sleep(3)

    def way_drips(self, before: int, asked: dict[str, Any]) -> None:
        whole = json.dumps(answer("x")).encode()
        self.send(200, b"", {"Content-Length": str(len(whole))})
        for i in range(len(whole)):
            try:
                self.wfile.write(whole[i : i + 1])
            except OSError:
                return
            time.sleep(0.05)

    def say(self, said: dict[str, Any]) -> None:
        self.send(200, json.dumps(said).encode())

    def send(self, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (extra or {})).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rude)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()

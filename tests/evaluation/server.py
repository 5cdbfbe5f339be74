"""A scripted chat-completions server: answers, and every way of not answering."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "503", "hang", "slow stream", "garbage", "cut", "no choices", "reset")


class Script:
    """What the server does: `plan(prompt, tries so far)` names a fault, or None to answer with `answer(prompt)`."""

    def __init__(self, plan=lambda prompt, tries: None, answer=lambda prompt: "m", logprobs=True, delay=0.0):
        self.plan, self.answer, self.logprobs, self.delay = plan, answer, logprobs, delay
        self.tries: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def body(self, prompt):
        text = self.answer(prompt)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if self.logprobs:
            other = "M" if text.strip() == "m" else "m"
            top = [{"token": text, "logprob": -0.2231435513}, {"token": other, "logprob": -1.6094379124}]
            first = {**top[0], "bytes": None, "top_logprobs": [{**t, "bytes": None} for t in top]}
            choice["logprobs"] = {"content": [first]}
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}
        return json.dumps({**whole, "usage": usage}).encode()


class Handler(BaseHTTPRequestHandler):
    script: Script

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        script = self.script
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = request["messages"][-1]["content"]
        with script.lock:
            script.keys.add(self.headers["authorization"])
            script.times.append(time.monotonic())
            fault = script.plan(prompt, script.tries[prompt])
            script.tries[prompt] += 1
            script.under_way += 1
            script.most_under_way = max(script.most_under_way, script.under_way)
        try:
            time.sleep(script.delay)
            self.reply(script, prompt, fault)
        except OSError:
            pass
        finally:
            with script.lock:
                script.under_way -= 1

    def reply(self, script, prompt, fault):
        if fault in ("429", "500", "503", "400", "401", "404"):
            error = {"error": {"message": f"no: {self.headers['authorization']}", "type": "x"}}
            headers = {"retry-after": "0.05"} if fault == "429" else {}
            return self.send(int(fault), json.dumps(error).encode(), headers)
        if fault == "quota":
            return self.send(429, b'{"error": {"message": "no money", "code": "insufficient_quota"}}')
        if fault == "hang":
            return time.sleep(1.5)
        if fault == "garbage":
            return self.send(200, b"<html>proxy error</html>", {"content-type": "text/html"})
        if fault == "no choices":
            return self.send(200, b'{"id": "x", "object": "chat.completion", "choices": []}')
        if fault == "reset":
            return self.connection.close()
        body = script.body(prompt)
        if fault == "cut":
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            return self.connection.close()
        if fault == "slow stream":  # a byte now and then: no single wait is long
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            for i in range(30):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                time.sleep(0.1)
            return None
        with script.lock:
            script.paid[prompt] += 1
        return self.send(200, body)

    def send(self, code, body, headers=None):
        self.send_response(code)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(script):
    """The base URL of a server that follows the script, until the block ends."""
    handler = type("Scripted", (Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()

"""A server under test: starts `lnv serve` on a free port of the loopback interface, asks it things, ends it.

Decision: standard library only, so that every gate may use it whatever else it installs.
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "testdata/demo"
KINDS = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def examples():
    """Questions about the built-in model's clips and stills, with the right answers."""
    return json.loads((DEMO / "answers.json").read_text())


def data_uri(path):
    path = Path(path)
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def medium(url, **how):
    """A part of a message, by what the address is of."""
    kind = "video_url" if "video/" in url[:12] else "image_url"
    return {"type": kind, kind: {"url": url, **how}}


def asked(question, *urls, **how):
    """One user message."""
    parts = [medium(url, **how) for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


class Server:
    """`lnv serve`, for as long as the `with` block runs. It must end by SIGTERM with status 0."""

    def __init__(self, *arguments, ready_s=120, end_s=45, **environment):
        self.program = os.environ["LNV"]
        self.arguments, self.ready_s, self.end_s = arguments, ready_s, end_s
        self.environment = environment
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.log = open(Path(os.environ.get("TMPDIR", "/tmp")) / f"serve-{self.port}.log", "w+")
        command = [self.program, "serve", "--host", "127.0.0.1", "--port", str(self.port), *self.arguments]
        environment = os.environ | self.environment
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        end = time.monotonic() + self.ready_s
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {self.process.returncode}:\n{self.said()}")
            try:
                if self.get("/ready")[0] == 200:
                    return self
            except OSError:
                pass
            if time.monotonic() > end:
                self.process.kill()
                raise SystemExit(f"not ready after {self.ready_s} s:\n{self.said()}")
            time.sleep(0.1)

    def __exit__(self, kind, *_):
        status = self.terminate()
        said = self.said()
        if kind is not None:
            print(f"--- the server's last words\n{said[-6000:]}", file=sys.stderr)
            return
        assert status == 0, f"SIGTERM ended it with {status}:\n{said[-6000:]}"
        assert "panicked" not in said, said[-6000:]

    def terminate(self):
        """Ends it politely; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(self.end_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "nothing: it had to be killed"

    def said(self):
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def get(self, path, **headers):
        return self.ask("GET", path, None, headers)

    def post(self, path, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, {"Content-Type": "application/json"} | headers)

    def ask(self, method, path, data=None, headers=None, timeout=120):
        """Status and body, read as JSON where it is."""
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode(errors="replace")

    def metrics(self):
        """Every figure of /metrics without labels."""
        text = self.get("/metrics")[1]
        found = re.findall(r"^([a-z_]+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def quiet(self, within_s=10):
        """Waits until nothing runs, waits or holds a cache block; the figures then."""
        end = time.monotonic() + within_s
        while True:
            now = self.metrics()
            busy = [
                name
                for name in ("lnv_requests_waiting", "lnv_requests_running", "lnv_cache_blocks_in_use")
                if now[name] != 0
            ]
            if not busy:
                return now
            assert time.monotonic() < end, {name: now[name] for name in busy}
            time.sleep(0.1)

    def resident_mb(self):
        """Memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


class Checks:
    """Runs checks one after the other and says which failed."""

    def __init__(self):
        self.failed = []
        self.ran = 0

    def run(self, check, *arguments):
        name = check.__name__.replace("_", " ")
        start = time.monotonic()
        self.ran += 1
        try:
            note = check(*arguments) or ""
            print(f"  ok    {name} ({time.monotonic() - start:.1f} s) {note}", flush=True)
        except Exception as error:
            import traceback

            self.failed.append(name)
            where = traceback.format_exc(limit=-3)
            print(f"  FAIL  {name}: {type(error).__name__}: {error}\n{where}", flush=True)

    def end(self):
        if self.failed:
            sys.exit(f"{len(self.failed)} of {self.ran} failed: {', '.join(self.failed)}")
        print(f"{self.ran} checks passed")

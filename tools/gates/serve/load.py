"""Load and faults for `lnv serve`, bounded and on loopback.

    LNV=lnv python load.py [--clients 200] [--seconds 120]

Every client asks one question after the other about the built-in model's clips. A third of the requests vanish
midway (while sending, while waiting, while the answer streams), a tenth bring broken media. Each answered one
must be answered as it is alone; a 429 or 503 must say when to come again; nothing may answer 5xx otherwise. The
memory of the second half must be that of the first. Then the server is ended in the middle of it all: what it
has taken is answered, and it ends with status 0.

Decision: HTTP by hand over asyncio, standard library only: a client library is too polite to vanish, and two
hundred of its threads would take the processor from the server.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from server import DEMO, Checks, Server, asked, data_uri, examples

SEED = 20261126
PATIENCE_S = 120
# What it may keep is filled within the first seconds: after that, what grows is a leak.
BUDGETS = ("--kv-cache-mib", "64", "--media-cache-mib", "32", "--feature-cache-mib", "16")
# Beyond this share of the first half's memory, and these megabytes, it is a leak.
GROWTH, GROWTH_MB = 1.10, 24


class Refused(Exception):
    """Nobody listens any more."""


async def call(port, path, body, kind="application/json", vanish=None):
    """Status, headers and body of one POST; None where it vanished. `vanish` is called with the stage, 'sending',
    'waiting' or the number of events read, and says whether to go."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        raise Refused(str(error)) from error
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode())
        if vanish and vanish("sending"):
            writer.write(body[: len(body) // 2])
            await writer.drain()
            return None
        writer.write(body)
        await writer.drain()
        if vanish and vanish("waiting"):
            return None
        return await answer(reader, vanish)
    except ConnectionError as error:
        raise Refused(str(error)) from error
    finally:
        writer.transport.abort() if vanish else writer.close()


async def answer(reader, vanish):
    line = await reader.readline()
    if not line:
        raise Refused("closed without an answer")
    status = int(line.split()[1])
    headers = {}
    while (line := (await reader.readline()).strip()):
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") != "chunked":
        return status, headers, await reader.read()
    data = bytearray()
    pieces = 0
    while size := int(await reader.readline(), 16):
        data += await reader.readexactly(size)
        await reader.readline()
        pieces += 1
        if vanish and vanish(pieces):
            return None
    return status, headers, bytes(data)


def text_of(body, streamed):
    """The answer within a response."""
    if not streamed:
        return json.loads(body)["choices"][0]["message"]["content"]
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events and events[-1] == "[DONE]", f"the stream broke: {events[-2:]}"
    chunks = [json.loads(event) for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks), chunks
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


class Load:
    """Clients, and what became of their requests."""

    def __init__(self, server):
        self.server = server
        self.random = random.Random(SEED)
        self.tally = Counter()
        self.wrong = []
        self.seconds = []
        self.resident = []
        # When it was told to end.
        self.ending = None
        self.uploads = {}
        self.alone = {}

    async def learn(self):
        """Every question once, alone, as data and as an upload; these are the right answers."""
        known = 0
        for example in examples():
            path = DEMO / example["file"]
            if example["file"] not in self.uploads:
                kind = "video/mp4" if path.suffix == ".mp4" else "image/png"
                status, _, body = await call(self.server.port, "/v1/media", path.read_bytes(), kind)
                assert status == 200, body
                self.uploads[example["file"]] = json.loads(body)["id"], path.suffix == ".mp4"
            for frames in (4, 8):
                status, _, body = await call(self.server.port, "/v1/chat/completions", self.request(example, frames))
                assert status == 200, body
                got = text_of(body, False)
                self.alone[example["file"], example["question"], frames] = got
                known += frames == 8 and got.strip() == example["answer"]
        assert known >= len(examples()) - 1, f"only {known} of {len(examples())} are right"

    def request(self, example, frames, stream=False, upload=False):
        how = {"num_frames": frames} if example["file"].endswith(".mp4") else {}
        name, video = self.uploads[example["file"]] if upload else (None, None)
        messages = asked(example["question"], data_uri(DEMO / example["file"]), **how)
        if upload:
            kind = "video_url" if video else "image_url"
            messages[0]["content"][0] = {"type": kind, kind: {"url": name, **how}}
        return json.dumps({"messages": messages, "stream": stream}).encode()

    def broken(self):
        """Media that are none: noise, a head without a body, a body with noise in it."""
        clip = (DEMO / self.random.choice(["left.mp4", "grows.mp4", "pair.jpg", "four.png"])).read_bytes()
        kind = self.random.randrange(3)
        if kind == 0:
            data = self.random.randbytes(self.random.choice([0, 1, 100, 5000]))
        elif kind == 1:
            data = clip[: self.random.randrange(1, len(clip) // 2)]
        else:
            data = bytearray(clip)
            for _ in range(200):
                data[self.random.randrange(len(data))] = self.random.randrange(256)
            data = bytes(data)
        return data

    async def one(self):
        """One request of whatever kind."""
        draw = self.random.random()
        start = time.monotonic()
        if draw < 0.1:
            await self.send_broken()
        elif draw < 0.1 + 1 / 3:
            await self.send_and_vanish()
        else:
            await self.send_and_check()
            self.seconds.append(time.monotonic() - start)

    async def send_broken(self):
        data = self.broken()
        if self.random.random() < 0.5:
            reply = await call(self.server.port, "/v1/media", data, "video/mp4")
        else:
            uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
            body = json.dumps({"messages": asked("What happens?", uri)}).encode()
            reply = await call(self.server.port, "/v1/chat/completions", body)
        # Some noise leaves a clip that can still be read.
        await self.expect(reply, "broken", {200, 400, 413})

    async def send_and_vanish(self):
        example = self.random.choice(examples())
        when = self.random.choice(["sending", "waiting", 1, 2, 4])
        stream = isinstance(when, int)
        body = self.request(example, self.random.choice([4, 8]), stream, self.random.random() < 0.5)
        await call(self.server.port, "/v1/chat/completions", body, vanish=lambda stage: stage == when)
        self.tally["vanished"] += 1

    async def send_and_check(self):
        example = self.random.choice(examples())
        frames, stream = self.random.choice([4, 8]), self.random.random() < 0.5
        body = self.request(example, frames, stream, self.random.random() < 0.5)
        reply = await call(self.server.port, "/v1/chat/completions", body)
        if await self.expect(reply, "answered", {200}):
            got = text_of(reply[2], stream)
            wanted = self.alone[example["file"], example["question"], frames]
            if got != wanted:
                self.wrong.append((example["file"], example["question"], frames, got, wanted))

    async def expect(self, reply, name, allowed):
        """Counts a reply; true where it is an answer."""
        status, headers, body = reply
        if status in (429, 503):
            assert status == 429 or self.ending, f"503 while it is not ending: {body}"
            wait = int(headers["retry-after"])
            assert wait >= 1 and json.loads(body)["error"]["message"], (headers, body)
            self.tally[str(status)] += 1
            await asyncio.sleep(0.1 if self.ending else wait * self.random.uniform(0.5, 1.5))
            return False
        if status not in allowed:
            self.wrong.append((name, status, body[:300]))
        elif status >= 400:
            assert json.loads(body)["error"]["message"], body
        self.tally[name] += 1
        return status == 200

    async def client(self, until):
        while time.monotonic() < until:
            start = time.monotonic()
            try:
                await asyncio.wait_for(self.one(), PATIENCE_S)
            except Refused as refused:
                # Only those who came when it was ending: what it has taken, it answers.
                if self.ending and start > self.ending - 0.05:
                    self.tally["refused while ending"] += 1
                    return
                self.wrong.append(("refused", str(refused)))
                await asyncio.sleep(0.2)
            except Exception as error:
                self.wrong.append((type(error).__name__, str(error)[:300]))

    async def watch(self, until):
        while time.monotonic() < until and not self.ending:
            self.resident.append(self.server.resident_mb())
            await asyncio.sleep(0.5)

    async def run(self, clients, seconds, end_after=None):
        until = time.monotonic() + seconds
        tasks = [asyncio.create_task(self.client(until)) for _ in range(clients)]
        tasks.append(asyncio.create_task(self.watch(until)))
        if end_after:
            await asyncio.sleep(end_after)
            self.ending = time.monotonic()
            self.server.process.terminate()
        await asyncio.gather(*tasks)


def the_load_is_borne(server, clients, seconds):
    load = Load(server)
    asyncio.run(load.learn())
    start = time.monotonic()
    asyncio.run(load.run(clients, seconds))
    took = time.monotonic() - start
    print(f"        {dict(load.tally)} in {took:.0f} s", flush=True)
    assert not load.wrong, f"{len(load.wrong)} wrong: {load.wrong[:5]}"
    assert load.tally["answered"] > clients, load.tally
    now = server.quiet(within_s=30)
    half = len(load.resident) // 2
    first, second = load.resident[half // 2 : half], load.resident[half:]
    most, late = max(first), max(second)
    assert late < max(most * GROWTH, most + GROWTH_MB), f"memory grew from {most:.0f} to {late:.0f} MB"
    assert now["lnv_requests_failed_total"] == 0, now
    return (
        f"{load.tally['answered'] / took:.1f} answers/s, median {statistics.median(load.seconds):.2f} s, "
        f"95 in 100 below {statistics.quantiles(load.seconds, n=20)[-1]:.2f} s, {most:.0f} then {late:.0f} MB"
    )


def a_short_queue_turns_away(server, clients):
    load = Load(server)
    asyncio.run(load.learn())
    asyncio.run(load.run(clients, 8))
    server.quiet(within_s=30)
    assert not load.wrong, f"{len(load.wrong)} wrong: {load.wrong[:5]}"
    assert load.tally["429"] > 0 and load.tally["answered"] > 0, load.tally
    return dict(load.tally)


def it_ends_in_the_middle(server, clients):
    load = Load(server)
    asyncio.run(load.learn())
    start = time.monotonic()
    asyncio.run(load.run(clients, 60, end_after=5))
    status = server.process.wait(30)
    assert status == 0, f"ended with {status}: {server.said()[-3000:]}"
    assert not load.wrong, f"{len(load.wrong)} wrong: {load.wrong[:5]}"
    return f"{dict(load.tally)}, over {time.monotonic() - start - 5:.1f} s after SIGTERM"


@contextmanager
def a_small_disk(megabytes):
    """A folder that holds so much; None where nobody may make one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def a_full_disk_is_told_of(server, folder):
    """Uploads that the disk has no room for are refused in words; those that fit, and questions, go on."""
    size = shutil.disk_usage(folder).total
    clip = (DEMO / "left.mp4").read_bytes()
    Path(folder, "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 64 * 1024))
    # What follows the boxes of an MP4 file is ignored: a clip of any size.
    large = clip + (8 + size).to_bytes(4, "big") + b"free" + bytes(size)
    statuses = set()
    for _ in range(3):
        status, said = server.ask("POST", "/v1/media", large, {"Content-Type": "video/mp4"})
        assert said["error"]["message"], said
        statuses.add(status)
    assert statuses <= {413, 429, 503, 507}, statuses
    for _ in range(3):
        body = {"messages": asked("What colour is it?", data_uri(DEMO / "left.mp4"))}
        status, told = server.post("/v1/chat/completions", body)
        assert status == 200 and told["choices"][0]["message"]["content"].strip() == "red", told
    Path(folder, "filler").unlink()
    status, told = server.ask("POST", "/v1/media", clip, {"Content-Type": "video/mp4"})
    assert status == 200, told
    server.quiet()
    return f"{statuses}: {said['error']['message']}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=120)
    chosen = parser.parse_args()
    checks = Checks()
    with Server(*BUDGETS) as server:
        checks.run(the_load_is_borne, server, chosen.clients, chosen.seconds)
    with Server("--max-waiting", "4") as server:
        checks.run(a_short_queue_turns_away, server, chosen.clients)
    with Server() as server:
        checks.run(it_ends_in_the_middle, server, chosen.clients // 4)
    with a_small_disk(4) as folder:
        if folder is None:
            print("  (no full disk: mounting one is not allowed here)")
        else:
            with Server(TMPDIR=folder) as server:
                checks.run(a_full_disk_is_told_of, server, folder)
    checks.end()


main()

"""What the README shows with curl, run as written against `lnv serve`."""

import json
import subprocess

from server import DEMO, Checks, Server, asked, data_uri


def curl(*arguments, body=None):
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "60", *arguments]
    if body is not None:
        command += ["--header", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(command, input=body, capture_output=True, text=True)
    return done.returncode, done.stdout


def a_question(server):
    body = json.dumps({"messages": asked("Which way does it move?", data_uri(DEMO / "left.mp4"))})
    status, said = curl(f"{server.url}/v1/chat/completions", body=body)
    assert status == 0 and json.loads(said)["choices"][0]["message"]["content"].strip() == "left", said


def a_stream(server):
    messages = asked("What happens?", data_uri(DEMO / "turns.mp4"))
    status, said = curl("--no-buffer", f"{server.url}/v1/chat/completions",
                        body=json.dumps({"messages": messages, "stream": True}))
    events = [line[len("data: "):] for line in said.splitlines() if line]
    assert status == 0 and events[-1] == "[DONE]", said
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas).strip() == "it turns green", said


def an_upload(server):
    status, said = curl(f"{server.url}/v1/media?num_frames=4", "--header", "Content-Type: video/mp4",
                        "--data-binary", f"@{DEMO / 'up.mp4'}")
    assert status == 0, said
    told = json.loads(said)
    parts = [{"type": "video_url", "video_url": {"url": told["id"]}}, {"type": "text", "text": "What shape is it?"}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]})
    said = curl(f"{server.url}/v1/chat/completions", body=body)[1]
    assert json.loads(said)["choices"][0]["message"]["content"].strip() == "square", said


def a_mistake(server):
    status, said = curl(f"{server.url}/v1/chat/completions", body='{"messages": "hello"}')
    assert status == 22 and json.loads(said)["error"]["param"] == "messages", (status, said)


def what_machines_ask(server):
    for path in ("health", "ready", "metrics", "openapi.json", "v1/models"):
        status, said = curl(f"{server.url}/{path}")
        assert status == 0, (path, said)
    assert "lnv_requests_answered" in curl(f"{server.url}/metrics")[1]


def main():
    checks = Checks()
    with Server() as server:
        for check in (a_question, a_stream, an_upload, a_mistake, what_machines_ask):
            checks.run(check, server)
    checks.end()


main()

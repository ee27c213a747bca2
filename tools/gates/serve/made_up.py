"""Requests that schemathesis makes up from /openapi.json, and whether the server is sound afterwards.

    LNV=lnv python made_up.py SECONDS
"""

import re
import subprocess
import sys
from collections import Counter

from server import DEMO, Checks, Server, asked, data_uri

# 5xx is what it is about. Positive data may still be refused: a schema cannot say which media exist.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
LONGEST_ANSWER_S = 30


def schemathesis_finds_nothing(server, seconds, *chosen):
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
        "--checks", ",".join(CHECKS),
        "--max-time", seconds,
        "--max-response-time", str(LONGEST_ANSWER_S),
        "--request-timeout", str(LONGEST_ANSWER_S),
        "--suppress-health-check", "all",
        "--warnings", "off",
        "--continue-on-failure",
        "--seed", "1",
        "--workers", "4",
        *chosen,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=int(seconds) * 2 + 120)
    assert done.returncode == 0, f"{done.stdout[-12000:]}\n{done.stderr[-2000:]}"
    cases = re.search(r"(\d+) generated", done.stdout)
    return f"{' '.join(chosen)}: {cases[1]} requests"


def it_still_answers(server):
    body = {"messages": asked("What colour is it?", data_uri(DEMO / "circle.png"))}
    status, said = server.post("/v1/chat/completions", body)
    assert status == 200 and said["choices"][0]["message"]["content"].strip() == "red", said
    server.quiet()


def main():
    checks = Checks()
    with Server() as server:
        # Apart, since what takes longer to answer would otherwise be asked least.
        third = str(max(int(sys.argv[1]) // 3, 1))
        for chosen in (
            ("--include-path", "/v1/chat/completions"),
            ("--include-path", "/v1/videos/questions"),
            ("--exclude-path", "/v1/chat/completions", "--exclude-path", "/v1/videos/questions"),
        ):
            checks.run(schemathesis_finds_nothing, server, third, *chosen)
        checks.run(it_still_answers, server)
        print("       ", Counter(re.findall(r"status=(\d+)", server.said())))
    checks.end()


main()

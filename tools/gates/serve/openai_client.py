"""The official OpenAI client, unchanged, against `lnv serve`.

    LNV=lnv python openai_client.py SMOLLM2_FOLDER
"""

import asyncio
import json
import math
import subprocess
import sys
import time
from typing import Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from server import DEMO, Checks, Server, asked, data_uri, examples, medium

CLIP = data_uri(DEMO / "left.mp4")
COLOUR = asked("What colour is it?", CLIP)
DESCRIBE = asked("Describe the video.", CLIP)
DESCRIPTION = "a red circle moves to the left on a white background"
KEY = "sesame"


def answer(client, messages, **how):
    return client.chat.completions.create(model=MODEL, messages=messages, **how)


def text(client, messages, **how):
    return answer(client, messages, **how).choices[0].message.content


def refused(kind, call, *words, param=None):
    """The call must fail with this class of the client's, and a sentence with these words."""
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is kind, f"{type(error).__name__}: {error}"
        said = error.body["message"]
        assert all(word in said for word in words), said
        assert error.body["type"], error.body
        if param:
            assert error.param == param, (error.param, said)
        return said
    raise AssertionError("was not refused")


def models_are_listed(client, _):
    listed = client.models.list().data
    assert [m.id for m in listed] == [MODEL], listed
    assert client.models.retrieve(MODEL).object == "model"
    refused(openai.NotFoundError, lambda: client.models.retrieve("nobody/nothing"))


def every_example_is_answered(client, _):
    wrong = []
    for example in examples():
        got = text(client, asked(example["question"], data_uri(DEMO / example["file"])))
        if got.strip() != example["answer"]:
            wrong.append((example, got))
    # The model is held to 95 in 100.
    assert len(wrong) <= 1, wrong
    return f"{len(examples())} questions"


def an_answer_has_the_shape_of_openais(client, _):
    got = answer(client, DESCRIBE)
    choice, usage = got.choices[0], got.usage
    assert choice.message.content == DESCRIPTION, choice
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert got.object == "chat.completion" and got.id and abs(got.created - time.time()) < 60
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens in (11, 12), usage


def a_stream_says_the_same(client, _):
    chunks = list(answer(client, DESCRIBE, stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == DESCRIPTION and len(pieces) > 5, pieces
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens in (11, 12)
    assert all(c.usage is None for c in chunks[:-1])


def the_streaming_helper_works(client, _):
    with client.chat.completions.stream(model=MODEL, messages=DESCRIBE) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == DESCRIPTION


def text_alone_is_answered(client, _):
    got = answer(client, [{"role": "user", "content": "How many shapes are there?"}])
    assert got.choices[0].message.content and got.usage.prompt_tokens < 40


def several_pictures_and_clips_are_read(client, server):
    """As the command reads them: the model was not trained for it, so the answer is only held to that."""
    files = [DEMO / "circle.png", DEMO / "pair.jpg"]
    question = "How many shapes are there?"
    typed = [part for file in files for part in ("--image", str(file))]
    command = [server.program, "ask", *typed, question]
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    got = text(client, asked(question, *map(data_uri, files)))
    assert got.strip() == expected, (got, expected)
    both = answer(client, asked(question, CLIP, data_uri(files[0])))
    one = answer(client, asked(question, CLIP))
    assert both.usage.prompt_tokens > one.usage.prompt_tokens


def frames_are_chosen_as_others_write_it(client, _):
    """Ours, vLLM's and SGLang's spellings mean the same."""
    def tokens(content, **extra):
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What happens?"}]}]
        return answer(client, messages, extra_body=extra).usage.prompt_tokens

    eight = tokens([medium(CLIP)])
    four = tokens([medium(CLIP, num_frames=4)])
    assert four < eight
    assert tokens([medium(CLIP) | {"num_frames": 4}]) == four
    assert tokens([medium(CLIP)], mm_processor_kwargs={"num_frames": 4}) == four
    assert tokens([medium(CLIP)], media_io_kwargs={"video": {"num_frames": 4}}) == four
    assert tokens([{"type": "video", "video": CLIP, "num_frames": 4}]) == four
    assert tokens([{"type": "video_url", "video_url": CLIP, "num_frames": 4}]) == four
    assert tokens([medium(CLIP, num_frames=4, start=0.2, end=1.0)]) == four


def an_uploaded_clip_is_asked_about(client, server):
    clip = (DEMO / "left.mp4").read_bytes()
    status, told = server.ask("POST", "/v1/media?num_frames=4", clip, {"Content-Type": "video/mp4"})
    assert status == 200, told
    assert told["kind"] == "video" and len(told["frames"]) == 4 and told["tokens"] > 0, told
    times = [frame["time_s"] for frame in told["frames"]]
    assert times == sorted(times) and times[-1] <= told["duration_s"]
    assert all(f["thumbnail"].startswith("data:image/jpeg;base64,") for f in told["frames"])
    again = server.get(f"/v1/media/{told['id']}?num_frames=2")[1]
    assert len(again["frames"]) == 2
    part = {"type": "video_url", "video_url": {"url": told["id"]}}
    content = [part, {"type": "text", "text": "What colour is it?"}]
    assert text(client, [{"role": "user", "content": content}]).strip() == "red"


def a_chat_goes_on_and_finds_its_clip_cached(client, _):
    first = text(client, COLOUR)
    said = {"role": "assistant", "content": first}
    more = answer(client, [*COLOUR, said, {"role": "user", "content": "Which way does it move?"}])
    assert more.choices[0].message.content
    usage = answer(client, COLOUR).usage
    share = usage.prompt_tokens_details.cached_tokens / usage.prompt_tokens
    assert share > 0.5, usage
    return f"{share:.0%} of the prompt found"


def many_questions_in_one_request_are_answered(client, _):
    pairs = [(e["question"], e["answer"]) for e in examples() if e["file"] == "left.mp4"]
    body = {"model": MODEL, "video": {"url": CLIP}, "questions": [q for q, _ in pairs]}
    got = client.post("/videos/questions", cast_to=dict, body=body)
    assert [one["answer"].strip() for one in got["data"]] == [a for _, a in pairs], got
    assert [one["index"] for one in got["data"]] == list(range(len(pairs)))


def several_answers_are_drawn_and_a_seed_repeats_them(client, _):
    how = {"n": 4, "temperature": 1.5, "seed": 7}
    one, two = (answer(client, DESCRIBE, **how) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert texts == [choice.message.content for choice in two.choices], "the seed did not repeat"
    other = answer(client, DESCRIBE, n=4, temperature=1.5, seed=8)
    assert len({*texts, *(c.message.content for c in other.choices)}) > 1
    assert one.usage.prompt_tokens == other.usage.prompt_tokens


def several_answers_are_streamed(client, _):
    texts = {}
    for chunk in answer(client, DESCRIBE, n=3, temperature=1.0, seed=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    whole = answer(client, DESCRIBE, n=3, temperature=1.0, seed=3)
    assert [texts[i] for i in range(3)] == [c.message.content for c in whole.choices], texts


def log_probabilities_are_told(client, _):
    got = answer(client, COLOUR, logprobs=True, top_logprobs=3).choices[0]
    tokens = got.logprobs.content
    assert "".join(t.token for t in tokens).strip() == got.message.content.strip() == "red"
    for token in tokens:
        tops = token.top_logprobs
        assert len(tops) == 3 and [t.logprob for t in tops] == sorted((t.logprob for t in tops), reverse=True)
        # Greedy: the token is the likeliest.
        assert tops[0].token == token.token and math.isclose(tops[0].logprob, token.logprob)
        assert sum(math.exp(t.logprob) for t in tops) <= 1 + 1e-6
        assert bytes(token.bytes).decode() == token.token
    streamed = answer(client, COLOUR, logprobs=True, top_logprobs=3, stream=True)
    same = [t for c in streamed for choice in c.choices if choice.logprobs for t in choice.logprobs.content or []]
    assert [t.logprob for t in same] == [t.logprob for t in tokens]


def an_answer_stops_where_told(client, _):
    got = answer(client, DESCRIBE, stop=["moves", "nothing"]).choices[0]
    assert got.message.content.strip() == "a red circle" and got.finish_reason == "stop", got
    streamed = answer(client, DESCRIBE, stop="moves", stream=True)
    pieces = [c.choices[0].delta.content or "" for c in streamed if c.choices]
    assert "".join(pieces).strip() == "a red circle", pieces
    short = answer(client, DESCRIBE, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3), short
    assert answer(client, DESCRIBE, max_tokens=3).choices[0].message.content == short.choices[0].message.content


def mistakes_are_the_clients_exceptions(client, server):
    bad = openai.BadRequestError

    def ask(messages=COLOUR, **how):
        return lambda: answer(client, messages, **how)

    refused(openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-4", messages=COLOUR), "gpt-4")
    refused(bad, ask(temperature=-1), "temperature", param="temperature")
    refused(bad, ask(temperature="hot"), "temperature", param="temperature")
    refused(bad, ask(n=0), param="n")
    refused(bad, ask(n=1000), param="n")
    refused(bad, ask(max_tokens=0), param="max_tokens")
    refused(bad, ask(top_p=2), param="top_p")
    refused(bad, ask(logprobs=True, top_logprobs=99), param="top_logprobs")
    refused(bad, ask([]))
    refused(bad, ask([{"role": "sorcerer", "content": "x"}]), "sorcerer")
    refused(bad, ask([{"role": "user", "content": [{"type": "smell"}]}]), "smell")
    refused(bad, ask(asked("?", "data:video/mp4;base64,AAAA")))
    refused(bad, ask(asked("?", "data:image/png;base64,@@@@")))
    refused(bad, ask(asked("?", "file:///etc/passwd")))
    refused(bad, ask(asked("?", "/etc/passwd")))
    refused(bad, ask(asked("?", "gopher://example.com/x.mp4")))
    refused(bad, ask(asked("?", CLIP, num_frames=0)))
    refused(bad, ask(asked("?", CLIP, num_frames=10**9)))
    refused(bad, ask(asked("?", CLIP, start=5, end=1)))
    for inside in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "0x7f.1", "[::ffff:127.0.0.1]"):
        refused(bad, ask(asked("?", f"http://{inside}:{server.port}/page/icon.svg")))
    refused(bad, ask(asked("what " * 5000)))
    # Words that the model's vocabulary cannot spell: a plain refusal, never a wrong answer.
    schema = {"name": "x", "schema": {"type": "object"}}
    refused(bad, ask(response_format={"type": "json_schema", "json_schema": schema}))
    with_status = server.post("/v1/chat/completions", b"{not json")
    assert with_status[0] == 400 and with_status[1]["error"]["message"], with_status
    assert server.get("/v1/nothing")[0] == 404 and server.get("/v1/chat/completions")[0] == 405


def many_ask_at_once(_, server):
    wanted = [e for e in examples()] * 3

    async def one(client, example):
        messages = asked(example["question"], data_uri(DEMO / example["file"]))
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def all_of_them():
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=8) as client:
            return await asyncio.gather(*(one(client, e) for e in wanted))

    got = asyncio.run(all_of_them())
    alone = {}
    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    for example, said in zip(wanted, got):
        key = (example["file"], example["question"])
        if key not in alone:
            alone[key] = text(client, asked(example["question"], data_uri(DEMO / example["file"])))
        assert said == alone[key], (example, said)
    return f"{len(wanted)} at once, each as alone"


def one_who_leaves_frees_everything(client, server):
    """Left while the clip is read and while text streams."""
    before = server.metrics()
    for leave_after in (0, 2):
        stream = answer(client, DESCRIBE, stream=True, temperature=1.9, seed=1)
        for at, _ in enumerate(stream):
            if at >= leave_after:
                break
        stream.close()
    now = server.quiet()
    assert now["lnv_requests_failed_total"] == before["lnv_requests_failed_total"]


def a_key_is_wanted_where_one_is_set():
    with Server("--api-key", KEY) as server:
        base = server.url + "/v1"
        stranger = OpenAI(base_url=base, api_key="wrong", max_retries=0)
        refused(openai.AuthenticationError, lambda: text(stranger, COLOUR))
        refused(openai.AuthenticationError, stranger.models.list)
        assert text(OpenAI(base_url=base, api_key=KEY), COLOUR).strip() == "red"
        # A browser has no key yet when it opens the page.
        assert server.get("/")[0] == 200 and server.get("/page/app.js")[0] == 200
        assert server.get("/health")[0] == 200
        assert KEY not in server.said()


class Capital(BaseModel):
    country: str
    capital: str
    population_in_millions: int
    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]


def json_follows_its_schema(client, _):
    ask = [{"role": "user", "content": "Tell me about the capital of France, as JSON."}]
    parsed = client.chat.completions.parse(model=MODEL, messages=ask, response_format=Capital, max_tokens=200)
    got = parsed.choices[0].message
    assert isinstance(got.parsed, Capital), got
    schema = {"name": "capital", "strict": True, "schema": Capital.model_json_schema()}
    how = {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 150}
    drawn = answer(client, ask, temperature=1.2, seed=5, n=4, **how)
    ended = [c.message.content for c in drawn.choices if c.finish_reason == "stop"]
    assert ended and all(Capital.model_validate_json(one) for one in ended), drawn
    streamed = "".join(c.choices[0].delta.content or "" for c in answer(client, ask, stream=True, **how) if c.choices)
    assert streamed == got.content, streamed
    return got.content


def any_json_is_json(client, _):
    ask = [{"role": "user", "content": "Write a JSON object with the name and age of a person."}]
    got = answer(client, ask, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    if got.finish_reason == "stop":
        assert isinstance(json.loads(got.message.content), dict)
    else:
        assert got.message.content.lstrip().startswith("{")
    return got.message.content


def a_long_answer_is_left_midway(client, server):
    ask = [{"role": "user", "content": "Write a very long story about a village by the sea."}]
    stream = answer(client, ask, stream=True, max_tokens=800)
    for at, _ in enumerate(stream):
        if at == 12:
            break
    before = server.metrics()
    start = time.monotonic()
    stream.close()
    after = server.quiet(within_s=5)
    assert after["lnv_requests_cancelled_total"] == before["lnv_requests_cancelled_total"] + 1, after
    assert after["lnv_generation_tokens_total"] - before["lnv_generation_tokens_total"] < 100
    return f"free after {time.monotonic() - start:.2f} s"


def words_of_many_bytes_stream_whole(client, _):
    ask = [{"role": "user", "content": "Repeat after me: 日本語 naïve 🙂 café"}]
    pieces = [c.choices[0].delta.content or "" for c in answer(client, ask, stream=True, max_tokens=60) if c.choices]
    assert "\ufffd" not in "".join(pieces), pieces
    assert "".join(pieces) == text(client, ask, max_tokens=60)


ABOUT_DEMO = [
    models_are_listed,
    every_example_is_answered,
    an_answer_has_the_shape_of_openais,
    a_stream_says_the_same,
    the_streaming_helper_works,
    text_alone_is_answered,
    several_pictures_and_clips_are_read,
    frames_are_chosen_as_others_write_it,
    an_uploaded_clip_is_asked_about,
    a_chat_goes_on_and_finds_its_clip_cached,
    many_questions_in_one_request_are_answered,
    several_answers_are_drawn_and_a_seed_repeats_them,
    several_answers_are_streamed,
    log_probabilities_are_told,
    an_answer_stops_where_told,
    mistakes_are_the_clients_exceptions,
    many_ask_at_once,
    one_who_leaves_frees_everything,
]
ABOUT_SMOLLM2 = [
    json_follows_its_schema,
    any_json_is_json,
    a_long_answer_is_left_midway,
    words_of_many_bytes_stream_whole,
]


def main():
    global MODEL
    checks = Checks()
    for arguments, wanted in (((), ABOUT_DEMO), (("--model", sys.argv[1]), ABOUT_SMOLLM2)):
        with Server(*arguments) as server:
            client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
            MODEL = client.models.list().data[0].id
            for check in wanted:
                checks.run(check, client, server)
            server.quiet()
        if wanted is ABOUT_DEMO:
            checks.run(a_key_is_wanted_where_one_is_set)
    checks.end()


main()

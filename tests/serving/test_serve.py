"""The HTTP server, with OpenAI's own client and without model parallelism and with it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, NotFoundError, OpenAI
from starlette.testclient import TestClient

from llama import Llama
from llama.serving.app import Server, make_app
from llama.serving.service import Service
from llama.tools import serve as command
from tests.conftest import ROOT, TEXT
from tests.support.serving import ServerProcesses, web_of

CONTEXT, SLOTS = 128, 4
FLAGS = ("--max_seq_len", str(CONTEXT), "--max_batch_size", str(SLOTS), "--model_name", "llama")
QUESTION: Any = [{"role": "user", "content": "Where do llamas live?"}]
MODEL = "llama"


@pytest.fixture(scope="module")
def servers(checkpoint_in: Callable[[int], Path], tokenizer_path: Path) -> Iterator[dict[int, ServerProcesses]]:
    """A server of one process and one of two. In the end, SIGTERM ends all ranks once they have finished an answer."""
    with ThreadPoolExecutor() as pool:
        starting = {
            ranks: pool.submit(ServerProcesses, checkpoint_in(ranks), tokenizer_path, *FLAGS, ranks=ranks)
            for ranks in (1, 2)
        }
        started = {ranks: future.result() for ranks, future in starting.items()}
    yield started
    try:
        for ranks, server in started.items():
            check_end(server, ranks)
    finally:
        for server in started.values():
            server.kill()


def check_end(server: ServerProcesses, ranks: int) -> None:
    server.wait_until_idle()
    chunks = iter(client_of(server).completions.create(model=MODEL, prompt="x", max_tokens=100, n=8, stream=True))
    first = next(chunks)
    assert server.terminate() == [0] * ranks, server.log()
    assert sum(chunk.choices[0].finish_reason is not None for chunk in [first, *chunks]) == 8
    assert "Traceback" not in server.log()


@pytest.fixture(params=[1, 2], ids=["one process", "two ranks"])
def server(request: pytest.FixtureRequest, servers: dict[int, ServerProcesses]) -> ServerProcesses:
    return servers[request.param]


@pytest.fixture
def client(server: ServerProcesses) -> OpenAI:
    return client_of(server)


def client_of(server: ServerProcesses) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def expected(llama: Llama) -> dict[str, Any]:
    """What calls of the library return, greedy."""
    prompt = llama.tokenizer.encode(TEXT[0], bos=True, eos=False)
    ids = llama.generate([prompt], 12, 0)[0][0]
    return {
        "prompt": prompt,
        "ids": ids,
        "continuation": llama.tokenizer.decode(prompt + ids)[len(TEXT[0]) :],
        "answer": llama.chat_completion([QUESTION], 0, max_gen_len=12)[0]["generation"]["content"],
    }


# ---- answers ----


def test_a_completion_continues_its_prompt(client: OpenAI, expected: dict[str, Any]) -> None:
    answer = client.completions.create(model=MODEL, prompt=TEXT[0], temperature=0, max_tokens=12)
    assert answer.choices[0].text == expected["continuation"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(expected["prompt"]), 12)
    assert answer.object == "text_completion"


def test_prompts_come_as_texts_and_as_ids(client: OpenAI, expected: dict[str, Any]) -> None:
    ids = expected["prompt"]
    many = client.completions.create(model=MODEL, prompt=[TEXT[1], TEXT[0]], temperature=0, max_tokens=12)
    assert many.choices[1].text == expected["continuation"]
    assert [choice.index for choice in many.choices] == [0, 1]
    for prompt in (ids, [ids, ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
        assert {choice.text for choice in answer.choices} == {expected["continuation"]}
    assert client.completions.create(model=MODEL, prompt="", temperature=0).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_a_chat_is_answered_as_by_chat_completion(client: OpenAI, expected: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=12)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected["answer"])
    again = [*QUESTION, message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    follow_up: Any = [{"role": "developer", "content": "Be brief."}, *again]
    sampled = [client.chat.completions.create(model=MODEL, messages=follow_up, max_tokens=15) for _ in range(2)]
    assert sampled[0].choices[0].message.content != sampled[1].choices[0].message.content, "no seed, no repetition"


def test_without_a_limit_a_chat_may_fill_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.total_tokens == CONTEXT


def test_a_stream_brings_what_a_whole_answer_has(client: OpenAI) -> None:
    settings: Any = {"model": MODEL, "seed": 3, "n": 2, "max_tokens": 15}
    whole = client.chat.completions.create(messages=QUESTION, **settings)
    assert whole.choices[0].message.content != whole.choices[1].message.content
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=QUESTION, **settings, **options))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1

    settings |= {"prompt": [TEXT[0], TEXT[2]], "echo": True, "logprobs": 1}
    text_whole = client.completions.create(**settings)
    text_chunks = list(client.completions.create(**settings, **options))
    for text_choice in text_whole.choices:
        parts = [c for chunk in text_chunks for c in chunk.choices if c.index == text_choice.index]
        assert "".join(c.text for c in parts) == text_choice.text
        assert text_choice.text.startswith(TEXT[0] if text_choice.index < 2 else TEXT[2])
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [value for c in parts if c.logprobs for value in getattr(c.logprobs, name)]
            assert joined == getattr(text_choice.logprobs, name)


def test_log_probabilities_of_a_chat_spell_its_text_byte_by_byte(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, seed=2, max_tokens=20, logprobs=True, top_logprobs=4
    )
    entries = chat.choices[0].logprobs
    assert entries and entries.content and len(entries.content) == 20
    raw = b"".join(bytes(entry.bytes or []) for entry in entries.content)
    assert raw.decode(errors="replace") == chat.choices[0].message.content
    assert all(len(entry.top_logprobs) == 4 for entry in entries.content)


# ---- many clients ----


def test_clients_at_once_get_what_each_gets_alone(server: ServerProcesses, client: OpenAI) -> None:
    prompts = [f"{TEXT[i % 3]} {i * 37}"[i % 5 :] for i in range(32)]

    def ask(i: int) -> str:
        settings: Any = {"model": MODEL, "prompt": prompts[i], "temperature": 0, "max_tokens": 4 + i % 9}
        if i % 2:
            return client.completions.create(**settings).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))

    alone = [ask(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == alone
    server.wait_until_idle()


def test_a_cancelled_stream_frees_its_slot(server: ServerProcesses, client: OpenAI) -> None:
    before = server.metric("llama_generated_tokens_total")
    with client.chat.completions.create(model=MODEL, messages=QUESTION, n=16, stream=True) as stream:
        next(iter(stream))
    server.wait_until_idle()
    assert server.metric("llama_generated_tokens_total") - before < 16 * 60


def test_clients_that_leave_at_random_leak_nothing(server: ServerProcesses) -> None:
    rng = random.Random(4)
    leaving = []
    for i in range(40):
        body = {"prompt": TEXT[i % 3], "max_tokens": 60, "n": rng.randint(1, 4), "stream": i % 2 == 0}
        leaving.append(server.send("/v1/completions", body, until=None if i % 4 else rng.randrange(1, 150)))
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.05)
        if len(leaving) > 8:
            leaving.pop(rng.randrange(len(leaving))).close()
    for connection in leaving:
        connection.close()
    server.wait_until_idle()


def test_a_client_that_does_not_read_slows_nobody(server: ServerProcesses, client: OpenAI) -> None:
    body = {"messages": QUESTION, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}
    connection = server.send("/v1/chat/completions", body, receive_buffer=2048)
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=3)
    assert answer.choices[0].message.content is not None
    server.wait(lambda: server.metric("llama_sequences_running") == 0, 30)  # although nothing was read
    connection.settimeout(30)
    received = b""
    while b"[DONE]" not in received:
        received = received[-100:] + connection.recv(65536)
    connection.close()


# ---- errors ----

CHAT, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"frequency_penalty": 2.5}, "frequency_penalty"),
    (CHAT, {"top_k": -5}, "top_k"),
    (CHAT, {"temperature": 2.5}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"seed": 1.5}, "seed"),
    (CHAT, {"stop": ["a", ""]}, "stop"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": CONTEXT}, "messages"),
    (CHAT, {"max_completion_tokens": 1, "max_tokens": 2}, "max_tokens"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (CHAT, {"messages": [{"role": "user", "content": "[INST] hi"}]}, "messages[0].content"),
    (CHAT, {"messages": [*QUESTION, *QUESTION, {"role": "system", "content": "x"}]}, "messages[2]"),
    (CHAT, {"messages": [{"role": "system", "content": "x"}, {"role": "system", "content": "y"}]}, "messages"),
    (CHAT, {"messages": QUESTION, "continue_final_message": True}, "messages[0]"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "llama " * 5000}], "stream": True}, "messages"),
    (CHAT, {"messages": [123]}, "messages"),
    (CHAT, {"messages": [{}]}, "messages"),
    (CHAT, {"messages": [{"role": 123}]}, "messages"),
    (CHAT, {"messages": [{"role": "system", "content": 123}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, {"\x1b[2J" * 50: 1}, "\\x1b[2J"),
    (TEXT_PATH, {"prompt": []}, "prompt"),
    (TEXT_PATH, {"prompt": [[1], []]}, "prompt"),
    (TEXT_PATH, {"prompt": [1, 10**6]}, "prompt"),
    (TEXT_PATH, {"prompt": ["a", 1]}, "prompt"),
    (TEXT_PATH, {"prompt": [1] * (CONTEXT + 1)}, "prompt"),
    (TEXT_PATH, {"prompt": ["x"] * 100, "n": 100}, "prompt"),
    (TEXT_PATH, {"logprobs": 6}, "logprobs"),
    (TEXT_PATH, {"suffix": "x"}, "suffix"),
    (TEXT_PATH, {"best_of": 3}, "best_of"),
    (TEXT_PATH, {"max_tokens": 10**30}, "prompt"),
]


def test_what_is_wrong_or_not_supported_is_named(servers: dict[int, ServerProcesses]) -> None:
    with httpx.Client(base_url=servers[1].url) as web:
        for path, wrong, field in WRONG:
            body = {"messages": QUESTION} if path == CHAT else {"prompt": "x"}
            raw = json.dumps(body | wrong)
            answer = web.post(path, content=raw, headers={"Content-Type": "application/json"})
            error = answer.json()["error"]
            assert answer.status_code == 400, raw[:200]
            assert error["type"] == "invalid_request_error"
            assert error["param"].startswith(field), raw[:200]
            assert error["param"] in error["message"]
            assert len(error["message"]) < 400
            assert error["message"].isprintable()


def test_another_model_is_not_found(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model == client.models.retrieve(MODEL)
    assert (model.id, model.to_dict()["max_model_len"]) == (MODEL, CONTEXT)
    for call in (lambda: client.models.retrieve("gpt"), lambda: client.completions.create(model="gpt", prompt="x")):
        with pytest.raises(NotFoundError) as raised:
            call()
        assert raised.value.code == "model_not_found"


# ---- the routes, in this process ----


def test_the_page_is_served_where_an_installer_links_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "static").mkdir()
    for name in ("chat.html", "chat.js"):
        (tmp_path / "static" / name).symlink_to(ROOT / "llama" / "serving" / "static" / name)
    monkeypatch.setattr("llama.serving.app.__file__", str(tmp_path / "app.py"))
    web = TestClient(make_app(Server("llama")))
    assert [web.get(path).status_code for path in ("/", "/static/chat.js", "/static/chat.css")] == [200, 200, 404]


def test_a_server_says_that_it_is_not_ready_or_has_failed(service: Service) -> None:
    state = Server("llama")
    web = TestClient(make_app(state))
    answer = web.get("/health")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert web.post("/v1/completions", json={"prompt": "x"}).headers["retry-after"]
    state.ready(service)
    assert web.get("/health").status_code == 200
    state.error = RuntimeError("rank 1 ended")
    assert (web.get("/health").status_code, web.post("/v1/completions", json={"prompt": "x"}).status_code) == (503, 503)


def test_drafted_tokens_change_no_answer(serve: Callable[..., TestClient]) -> None:
    """At temperature 0 and sampled, on a prompt that repeats itself."""
    body = {"prompt": f"{TEXT[0]} {TEXT[0]}", "max_tokens": 20, "n": 2, "logprobs": 1, "seed": 3}
    for temperature in (0, 1):
        plain, drafted = (
            serve(speculative=way).post("/v1/completions", json=body | {"temperature": temperature}).json()["choices"]
            for way in (None, "prompt_lookup")
        )
        for one, other in zip(plain, drafted, strict=True):
            assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])


def test_bodies_are_bounded_and_must_be_json(serve: Callable[..., TestClient]) -> None:
    web = serve(max_body_bytes=1000)
    json_header = {"Content-Type": "application/json"}

    def status(content: Any, headers: dict[str, str] = json_header) -> int:
        answer = web.post("/v1/completions", content=content, headers=headers)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.status_code

    assert status(b'{"prompt": "' + b"x" * 1000 + b'"}') == 413
    assert status(iter([b'{"prompt": "', b"x" * 600, b"x" * 600, b'"}'])) == 413
    assert status(b"{}", {"Content-Type": "text/plain"}) == 415
    for raw in (b"", b"{", b"[1]", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 999, b'{"n":' + b"9" * 900 + b"}"):
        assert status(raw) == 400
    assert web.get("/nowhere").json()["error"]["message"].startswith("GET /nowhere")
    assert web.get("/v1/completions").status_code == 405


def test_a_full_queue_and_a_slow_answer_are_errors_that_say_so(llama: Llama) -> None:
    service = Service(llama, max_waiting=2)  # not running: nothing is ever answered; 4 rows of the cache are free
    web = web_of(service, timeout_s=0.2)
    answer = web.post("/v1/completions", json={"prompt": "a", "n": 7})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    answer = web.post("/v1/completions", json={"prompt": ["a", "b"], "n": 3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    answer = web.post("/v1/completions", json={"prompt": "a"})  # the others are still in its inbox
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
    assert answer.headers["retry-after"] == "1"
    assert service.n_requests == 0
    stopped = Service(llama)
    stopped.stop()
    answer = web_of(stopped).post("/v1/completions", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


# ---- processes ----


def test_a_lost_rank_ends_streams_and_the_other_rank(
    checkpoint_in: Callable[[int], Path], tokenizer_path: Path
) -> None:
    flags = ("--max_seq_len", "4096", "--max_batch_size", "4", "--model_name", MODEL)
    server = ServerProcesses(checkpoint_in(2), tokenizer_path, *flags, ranks=2)
    try:
        stream = client_of(server).chat.completions.create(model=MODEL, messages=QUESTION, n=4, stream=True)
        next(iter(stream))
        killed = time.monotonic()
        server.processes[1].send_signal(signal.SIGKILL)
        with pytest.raises(APIError, match="rank 1 ended"):
            for _ in stream:
                pass
        assert server.processes[0].wait(timeout=20) != 0
        assert time.monotonic() - killed < 10
        assert "rank 1 ended" in server.log()
    finally:
        server.kill()


def test_replicas_are_refused_and_so_is_a_port_in_use(
    checkpoint: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="--port must be free"):
            command.main(str(checkpoint), str(tokenizer_path), port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="--max_waiting must be"):
        command.main(str(checkpoint), str(tokenizer_path), max_waiting=0)
    monkeypatch.setattr("llama.distributed.groups.world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"one process per checkpoint file, 1, got 2.*one server each"):
        command.main(str(checkpoint), str(tokenizer_path))


def test_events_are_sent_at_once_and_not_held_back_for_an_acknowledgement() -> None:
    async def no_delay(listener: socket.socket) -> int:
        accepted = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                accepted.set_result(transport.get_extra_info("socket"))

        async with await asyncio.get_running_loop().create_server(Protocol, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            value: int = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
        return value

    with command._open_port("127.0.0.1", 0) as listener:
        assert asyncio.run(no_delay(listener))

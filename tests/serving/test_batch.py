"""Batch files: each request has one result, also after kills; results are those of the library's own calls."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.serving import jobs
from llama.serving.batch import MAX_CHOICES, Line, Results, read_body, read_line, read_requests
from llama.serving.endpoints import Request
from llama.serving.errors import ApiError
from llama.serving.jobs import Planner
from llama.tools.batch import main
from tests.serving.test_serve import CHAT, WRONG
from tests.serving.test_serve import TEXT_PATH as COMPLETIONS
from tests.support.processes import Program, clean_environment, run_python
from tests.support.ranks import run_ranks

Reader = Callable[[Line], Request]
DIALOG: Any = [{"role": "user", "content": "Hi"}]
BODIES: Any = {CHAT: {"messages": DIALOG}, COMPLETIONS: {"prompt": "a"}}
N_REQUESTS = 60
N_KILLS = 2


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def requests(n: int) -> list[dict[str, Any]]:
    """Greedy and sampled ones, chats and texts, of skewed lengths."""
    rng = random.Random(n)
    made = []
    for i in range(n):
        body: dict[str, Any] = {
            "temperature": rng.choice([0, 0, 0.8]),
            "max_tokens": 1 + min(20, int(rng.expovariate(0.15))),
        }
        if i % 3:
            made.append(line(f"text-{i}", COMPLETIONS, prompt=f"The fox number {i}" * rng.randint(1, 3), **body))
        else:
            made.append(line(f"chat-{i}", CHAT, messages=[{"role": "user", "content": f"Who is {i}?"}], **body))
    return made


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def read(path: Path) -> dict[str, Any]:
    """The results by `custom_id`, without what differs between two runs; each has to be there once."""
    found: dict[str, Any] = {}
    for text in path.read_text().splitlines():
        fields = json.loads(text)
        fields["response"]["body"].pop("created", None)
        assert fields["custom_id"] not in found
        found[fields["custom_id"]] = fields
    return found


@pytest.fixture(scope="module")
def flags(checkpoint: Path, tokenizer_path: Path) -> dict[str, Any]:
    """Of a run on the random checkpoint, as the fixture `llama` has it."""
    paths = {"ckpt_dir": str(checkpoint), "tokenizer_path": str(tokenizer_path), "model": "random"}
    return paths | {"max_seq_len": 64, "max_batch_size": 4, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> dict[str, Any]:
    """The results of the requests from one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("batch")
    main(str(write(folder / "in.jsonl", requests(N_REQUESTS))), str(folder / "out.jsonl"), **flags)
    return read(folder / "out.jsonl")


# ---- results ----


@pytest.fixture(scope="module")
def reader(llama: Llama) -> Reader:
    return partial(read_body, planner=Planner(llama, MAX_CHOICES, "random"), seed=1)


def continuation(llama: Llama, prompt: str, **options: Any) -> str:
    """What a completion adds to its prompt, with the space between them, which `text_completion` drops."""
    ids = llama.tokenizer.encode(prompt, bos=True, eos=False)
    return llama.tokenizer.decode(ids + llama.generate([ids], **options)[0][0])[len(prompt) :]


def test_each_result_is_what_the_library_returns_for_the_request_alone(
    expected: dict[str, Any], llama: Llama, reader: Reader
) -> None:
    assert len(expected) == N_REQUESTS
    for request in requests(N_REQUESTS):
        body, url = request["body"], request["url"]
        answer = expected[request["custom_id"]]["response"]["body"]
        seed = reader(read_line(1, json.dumps(request).encode())).job.params.seed
        options: dict[str, Any] = {"temperature": body["temperature"], "top_p": 1, "max_gen_len": body["max_tokens"]}
        options["seed"] = seed
        choice = answer["choices"][0]
        if url == CHAT:
            alone = llama.chat_completion([body["messages"]], **options)[0]
            assert choice["message"] == alone["generation"] | {"refusal": None}
        else:
            alone = llama.text_completion([body["prompt"]], **options)[0]
            assert choice["text"] == continuation(llama, body["prompt"], **options)
        assert choice["finish_reason"] == alone["finish_reason"]


def test_the_official_clients_types_take_the_results(expected: dict[str, Any]) -> None:
    types = pytest.importorskip("openai.types", reason="needs the package openai, of the extra [test]")
    for custom_id, fields in expected.items():
        assert set(fields) == {"id", "custom_id", "response", "error"}
        assert fields["error"] is None and fields["response"]["status_code"] == 200
        body = fields["response"]["body"] | {"created": 0}
        kind = types.chat.ChatCompletion if custom_id.startswith("chat") else types.Completion
        usage = kind.model_validate(body, strict=True).usage
        assert body["model"] == "random"
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert 0 <= usage.completion_tokens <= 64


def test_stop_strings_and_defaults_are_openais(tmp_path: Path, flags: dict[str, Any], llama: Llama) -> None:
    whole = continuation(llama, "The quick", temperature=0, max_gen_len=16)
    stop = whole[5:8]
    lines = [
        line("cut", COMPLETIONS, prompt="The quick", temperature=0, stop=[*"0123456789", stop]),
        line("whole", COMPLETIONS, prompt=["The quick"], temperature=0, stop=None, n=1, echo=False, logit_bias={}),
        line("ids", COMPLETIONS, prompt=llama.tokenizer.encode("The quick", bos=True, eos=False), temperature=0),
        line("chat", CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], temperature=0),
    ]
    choices = run(tmp_path, flags, lines)
    assert choices["cut"][0]["text"] == whole[: whole.index(stop)]
    assert choices["cut"][0]["finish_reason"] == "stop"
    assert choices["whole"][0]["text"] == choices["ids"][0]["text"] == whole  # 16 tokens, unless asked for more
    assert choices["chat"][0]["message"]["content"] == content(llama.chat_completion([DIALOG], temperature=0))


def run(folder: Path, flags: dict[str, Any], lines: list[Any]) -> dict[str, Any]:
    """The choices of each result."""
    main(str(write(folder / "in", lines)), str(folder / "out"), **flags)
    return {name: fields["response"]["body"]["choices"] for name, fields in read(folder / "out").items()}


def content(answers: Any) -> str:
    text: str = answers[0]["generation"]["content"]
    return text


def test_several_choices_and_prompts_and_log_probabilities_are_the_servers(
    tmp_path: Path, flags: dict[str, Any], llama: Llama
) -> None:
    """What `n`, a list of prompts, `logprobs` and `echo` mean, by the library's own calls."""
    lines = [
        line("n", CHAT, messages=DIALOG, n=3, seed=5, max_tokens=6),
        line("prompts", COMPLETIONS, prompt=["The", "A fox"], temperature=0, max_tokens=4, n=2),
        line("scored", COMPLETIONS, prompt="The quick", temperature=0, max_tokens=3, logprobs=2, echo=True),
        line("top", CHAT, messages=DIALOG, temperature=0, max_tokens=3, logprobs=True, top_logprobs=4),
    ]
    found = run(tmp_path, flags, lines)
    answers = [content(llama.chat_completion([DIALOG], 1, 1, 6, seed=5 + i)) for i in range(3)]
    assert [choice["message"]["content"] for choice in found["n"]] == answers
    texts = [continuation(llama, prompt, temperature=0, max_gen_len=4) for prompt in ("The", "A fox") for _ in "ab"]
    assert [choice["text"] for choice in found["prompts"]] == texts
    ids = llama.tokenizer.encode("The quick", bos=True, eos=False)
    rows, scores = llama.generate([ids], 3, 0, logprobs=True, echo=True)
    scored = found["scored"][0]
    assert scores and scored["text"] == llama.tokenizer.decode(rows[0])
    assert scored["logprobs"]["token_logprobs"][0] is None
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(scores[0][1:], abs=1e-4)
    entries = found["top"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [4, 4, 4]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)  # greedy


# ---- lines that are refused ----


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        *((url, BODIES[url] | wrong, param) for url, wrong, param in WRONG if "stream" not in str(wrong)),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": DIALOG, "stream": True}, "stream"),
        (CHAT, {"messages": DIALOG, "prompt": "Hi"}, "prompt"),
        (CHAT, {"messages": DIALOG, "model": "gpt-5"}, "model"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_completion_tokens": 3}, "max_completion_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": True}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": float("nan")}, "temperature"),
        ("/v1/embeddings", {}, "url"),
        (CHAT, [], "body"),
    ],
)
def test_what_is_wrong_or_not_supported_is_an_error_that_names_the_field(
    url: str, body: Any, param: str, reader: Reader
) -> None:
    """What the server's routes refuse, and what a line may not have."""
    raw = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
    with pytest.raises(ApiError) as refused:
        reader(read_line(1, raw))
    assert refused.value.param and refused.value.param.startswith(param)
    assert refused.value.param in str(refused.value)


def test_a_bad_line_becomes_an_error_line_and_the_others_run(
    tmp_path: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    good = line("good", COMPLETIONS, prompt="A", max_tokens=2)
    bad = ["{", "[1]", b"\xff".decode("latin-1"), "[" * 100_000, "", good | {"custom_id": "m", "method": "GET"}]
    path = write(tmp_path / "in", [*bad, good | {"custom_id": "e", "extra": 1}, good])
    for _ in range(2):  # the second time, all of them are done
        main(str(path), str(tmp_path / "out"), **flags)
    results = [json.loads(text) for text in (tmp_path / "out").read_text().splitlines()]
    assert len(results) == 7
    errors = [fields for fields in results if fields["error"]]
    assert [fields["error"]["line"] for fields in errors] == [1, 2, 3, 4, 6, 7]
    assert [fields["error"]["param"] for fields in errors] == [None] * 4 + ["method", "extra"]
    assert all(fields["response"]["status_code"] == 400 for fields in errors)
    assert [fields["custom_id"] for fields in results if not fields["error"]] == ["good"]
    assert "7 requests, 6 of them refused" in (printed := capsys.readouterr().out)
    assert "all 7 requests have results already, 6 refused" in printed


# ---- interruptions ----


def test_killed_at_random_it_ends_with_each_result_once(
    tmp_path: Path, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Each run is killed once it has added some lines; what is at the end of the file may then be torn, as here."""
    rng = random.Random(8)
    source, target = write(tmp_path / "in.jsonl", requests(N_REQUESTS)), tmp_path / "out.jsonl"
    options = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = ["-m", "llama.tools.batch", "--input", source, "--output", target, *options]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    files = (source, tmp_path / "printed", tmp_path / "errors")
    for _ in range(N_KILLS):
        before = target.stat().st_size if target.exists() else 0
        process = Program(*command, files=files, env=environment)
        enough = before + rng.randint(1, 8_000)
        while process.poll() is None and (not target.exists() or target.stat().st_size < enough):
            time.sleep(0.001)
        process.kill()
        assert process.wait(60) in (0, -signal.SIGKILL), files[2].read_text()
        os.truncate(target, target.stat().st_size - rng.randint(1, 300))
    ended = run_python(*command, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert read(target) == expected


@pytest.mark.parametrize("cut", [1, 2, 20, 4096, 9000])
def test_a_torn_last_line_is_removed_and_a_missing_newline_added(cut: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in", requests(3))
    ids = [request.result_id for request in read_requests(source)]
    whole = [json.dumps({"id": id, "text": "x" * 5000}).encode() for id in ids]
    path = tmp_path / "out"
    path.write_bytes(b"\n".join(whole) + b"\n")
    os.truncate(path, path.stat().st_size - cut)
    results = Results(source, path)
    n_whole = 3 if cut == 1 else 2 if cut < 5000 else 1
    assert list(results.pending) == [1, 2, 3][n_whole:]
    results.append(whole[0] + b"\n")
    results.close()
    assert path.read_bytes() == b"\n".join([*whole[:n_whole], whole[0]]) + b"\n"


def test_a_run_goes_on_where_another_stopped(tmp_path: Path, flags: dict[str, Any], expected: dict[str, Any]) -> None:
    """With requests that another run has not seen behind those that it has."""
    source, target = tmp_path / "in", tmp_path / "out"
    for n in (20, N_REQUESTS):
        main(str(write(source, requests(N_REQUESTS)[:n])), str(target), **flags)
        assert len(read(target)) == n
    assert read(target) == expected


def test_an_input_that_does_not_fit_its_results_is_refused_before_any_work(
    tmp_path: Path, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(name, COMPLETIONS, prompt=name, max_tokens=1) for name in "ab"]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    main(str(source), str(target), **flags)
    before = target.read_bytes()
    monkeypatch.setattr(Llama, "build", None)
    for changed, message in (
        (lines[1:], "is the result of custom_id 'a': the input has no such request"),
        ([lines[1], line("a", COMPLETIONS, prompt="Z")], "'a': line 2 of the input has another .* remove its result"),
        ([*lines, lines[0]], "line 3 must have a custom_id of its own, got 'a', which line 1 has too"),
        ([*lines, {"method": "POST"}], "line 3 must have a custom_id, a string of its own, got none"),
        ([*lines, lines[0] | {"custom_id": 5}], "line 3 must have a custom_id, .*, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            main(str(write(source, changed)), str(target), **flags)
        assert target.read_bytes() == before


def test_results_of_other_settings_are_not_continued(tmp_path: Path, flags: dict[str, Any]) -> None:
    lines = [line(name, COMPLETIONS, prompt=name, max_tokens=1) for name in "ab"]
    source, target = tmp_path / "in", tmp_path / "out"
    main(str(write(source, lines[:1])), str(target), **flags)
    write(source, lines)
    for change in ({"seed": 2}, {"max_seq_len": 32}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="whose line 1 is a result of others"):
            main(str(source), str(target), **flags | change)


def test_a_file_that_is_no_file_of_results_is_refused_and_left_alone(tmp_path: Path, flags: dict[str, Any]) -> None:
    source, target = write(tmp_path / "in", requests(2)), tmp_path / "notes.txt"
    for notes in ("my notes\nmore of them\n", "my notes"):  # the second one as if cut in the middle of a line
        target.write_text(notes)
        with pytest.raises(ValueError, match=r"notes\.txt, line 1: each line must be a result"):
            main(str(source), str(target), **flags)
        assert target.read_text() == notes
    with pytest.raises(ValueError, match="--output must be a file other than --input"):
        main(str(source), str(source), **flags)
    with pytest.raises(FileNotFoundError, match="--input must be a file of requests"):
        main(str(tmp_path / "none"), str(target), **flags)


def test_two_runs_do_not_write_one_file(tmp_path: Path, flags: dict[str, Any]) -> None:
    source = write(tmp_path / "in", requests(2))
    first = Results(source, tmp_path / "out")
    with pytest.raises(ValueError, match="--output must be a file that no other process is writing"):
        main(str(source), str(tmp_path / "out"), **flags)
    first.close()


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (lambda source, target: source.write_text(""), "2 requests without a result in .*, such as 'a', 'b'"),
        (lambda source, target: target.unlink(), "--output must not change while .*, got 2 requests"),
        (lambda source, target: os.truncate(target, target.stat().st_size - 9), "--output .*, got 1 requests"),
    ],
    ids=["input cut", "output removed", "output cut"],
)
def test_success_is_said_only_if_the_file_holds_all_results(
    happens: Callable[[Path, Path], Any],
    message: str,
    tmp_path: Path,
    flags: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [line(name, COMPLETIONS, prompt=name, max_tokens=1) for name in "ab"]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    build = Llama.build

    def while_building(*args: Any, **options: Any) -> Llama:
        if "output" in message:
            monkeypatch.setattr(Results, "check", lambda self: (happens(source, target), check(self))[1])
        else:
            happens(source, target)
        return build(*args, **options)

    check = Results.check
    monkeypatch.setattr(Llama, "build", while_building)
    with pytest.raises(ValueError, match=message):
        main(str(source), str(target), **flags)


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    results = Results(write(tmp_path / "in", []), tmp_path / "out")
    results._file.close()
    results._file = open("/dev/full", "a+b")  # noqa: SIM115
    with pytest.raises(
        OSError, match=r"out could not be written \(No space left on device\); .* start the command again"
    ):
        results.append(b"{}\n")


# ---- ranks ----


def complete(rank: int, source: str, target: str, flags: dict[str, Any]) -> int:
    """Runs the batch; returns how many requests this rank worked on. Only the first one gets paths that are there."""
    started: list[Any] = []
    start = jobs.Request
    jobs.Request = lambda *args, **options: (started.append(args), start(*args, **options))[1]  # type: ignore
    main(source if rank == 0 else "/nowhere/in", target if rank == 0 else "/nowhere/out", **flags)
    return len(started)


@pytest.mark.parametrize(("n_ranks", "mp"), [(2, 1), (4, 2)], ids=["2 replicas", "2 replicas of MP 2"])
def test_ranks_write_what_one_process_writes(
    n_ranks: int,
    mp: int,
    tmp_path: Path,
    flags: dict[str, Any],
    expected: dict[str, Any],
    checkpoint_in: Callable[[int], Path],
) -> None:
    source, target = write(tmp_path / "in", requests(N_REQUESTS)), tmp_path / "out"
    sharded = {"ckpt_dir": str(checkpoint_in(mp)), "model_parallel_size": mp}
    n_started = run_ranks(n_ranks, complete, str(source), str(target), flags | sharded)
    assert read(target) == expected
    replicas = [n_started[i : i + mp] for i in range(0, n_ranks, mp)]
    assert all(min(group) == max(group) > N_REQUESTS // 10 for group in replicas)
    assert sum(group[0] for group in replicas) == N_REQUESTS

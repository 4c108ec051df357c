"""download.sh, run as users run it, against a server on this machine that fails in every way we know of.

Nothing here leaves 127.0.0.1. Each run sees only the tools in a folder of its own, so that curl and wget, md5sum and
macOS's md5 are each tried alone, and each run is checked for having shown the link or written it into a file.
"""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.download import (
    BASH,
    CHAT_7B,
    COMMON,
    HANG_S,
    QUERY,
    SCRIPT,
    SHARD,
    SHARD_SIZE,
    TREE,
    Download,
    Server,
    Terminal,
    checklist_of,
    is_gnu_wget_1,
    real_tool,
    tree_of,
    wait_until,
    without,
)

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["curl", "wget"])
def download(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Download:
    """One for each downloader, for what differs between them. All of 7B but its shard is there already."""
    if request.param == "wget" and not is_gnu_wget_1():
        pytest.skip("needs GNU wget 1")
    download = Download(tmp_path, server, request.param)
    download.put_all(without(tree_of("7b"), SHARD))
    return download


@pytest.fixture
def any_download(tmp_path: Path, server: Server) -> Download:
    """The same with whichever downloader is there, for what does not depend on it."""
    download = Download(tmp_path, server, "wget" if is_gnu_wget_1() and not shutil.which("curl") else "curl")
    download.put_all(without(tree_of("7b"), SHARD))
    return download


# --- what is asked for ---


def test_all_models(download: Download) -> None:
    download.start_empty()
    outcome = download.run(MODEL_SIZE="")
    outcome.expect(0)
    assert download.files() == TREE
    assert sorted(download.server.paths()) == sorted(TREE)


@pytest.mark.parametrize(
    ("answer", "models"),
    [
        ("7B", ["7b"]),
        ("7b-CHAT, 13B", ["7b-chat", "13b"]),
        ("13B-chat 7B", ["13b-chat", "7b"]),
        (",7B,,7B,\n", ["7b"]),
    ],
)
def test_some_models(any_download: Download, answer: str, models: list[str]) -> None:
    any_download.start_empty()
    outcome = any_download.run(MODEL_SIZE=answer)
    outcome.expect(0)
    assert any_download.files() == tree_of(*models)
    assert sorted(any_download.server.paths()) == sorted(any_download.files())


@pytest.mark.parametrize("answer", ["7B,8B", "7B-base", "7B;13B", "*", "7", "--help"])
def test_unknown_model_is_refused_before_anything_is_fetched(any_download: Download, answer: str) -> None:
    outcome = any_download.run(MODEL_SIZE=answer)
    outcome.expect(2, "unknown model", "7B,13B,70B,7B-chat,13B-chat,70B-chat")
    assert any_download.server.requests == []


def test_link_given_as_the_model_is_not_shown(any_download: Download) -> None:
    outcome = any_download.run(MODEL_SIZE=any_download.server.url)
    outcome.expect(2, "no model name")


@pytest.mark.parametrize("variable", ["PRESIGNED_URL", "MODEL_SIZE"])
def test_without_terminal_and_variable(any_download: Download, variable: str) -> None:
    outcome = any_download.run(**{variable: None})
    outcome.expect(2, f"{variable} is not set", "no terminal")
    assert any_download.server.requests == []


def test_help(any_download: Download) -> None:
    for flag in ("-h", "--help"):
        outcome = any_download.run(flag)
        assert outcome.status == 0
        assert all(name in outcome.output for name in ("PRESIGNED_URL", "MODEL_SIZE", "TARGET_FOLDER", "70B-chat"))
    any_download.run("7B").expect(2, "only argument")
    any_download.run(any_download.server.url).expect(2, "only argument")
    assert any_download.server.requests == []


@pytest.mark.parametrize(("knob", "value"), [("RETRIES", "-1"), ("RETRY_DELAY", "08"), ("STALL_SECONDS", "x")])
def test_knobs_are_whole_numbers(any_download: Download, knob: str, value: str) -> None:
    outcome = any_download.run(**{knob: value})
    outcome.expect(2, knob)


# --- the link ---


@pytest.mark.parametrize(
    "paste",
    [
        "{amp}",
        "  {url}\n",
        '"{url}"',
        "'{url}'",
        "\u201c{url}\u201d\u00a0",
        "<{url}>\r\n",
        "{wrapped}",
        "{backslashes}",
        "{percent}",
    ],
)
def test_url_is_unescaped(any_download: Download, paste: str) -> None:
    url = any_download.server.url
    forms = {
        "url": url,
        "amp": url.replace("&", "&amp;"),
        "wrapped": f"{url[:60]}\n {url[60:]}",
        "backslashes": url.replace("?", "\\?").replace("=", "\\=").replace("*", "\\*"),
        "percent": url.replace("*", "%2A"),
    }
    outcome = any_download.run(PRESIGNED_URL=paste.format(**forms))
    outcome.expect(0)
    assert any_download.files() == tree_of("7b")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"https://127.0.0.1/LICENSE?{QUERY}", "no *"),
        (f"https://127.0.0.1/l.php?u=https%3A%2F%2Fexample%2F%2A%3F{QUERY}", "no *"),
        (f"https://127.0.0.1/?{QUERY}*", "no *"),
        (f"ftp://127.0.0.1/*?{QUERY}", "does not begin with http"),
        (f"127.0.0.1/*?{QUERY}", "does not begin with http"),
        ("7B", "does not begin with http"),
        (' "" ', "empty"),
    ],
)
def test_url_that_cannot_be_right(any_download: Download, url: str, says: str) -> None:
    outcome = any_download.run(PRESIGNED_URL=url)
    outcome.expect(2, says)


def test_link_is_in_no_argument_and_no_environment(download: Download) -> None:
    downloader = "curl" if (download.bin / "curl").exists() else "wget"
    seen = download.folder / "seen"
    real = real_tool(downloader)
    download.install(downloader, f'{{ printf "%s\\n" "$@"; export -p; }} >>"{seen}"\nexec "{real}" "$@"')
    outcome = download.run(url="exported")  # looks for the link in every file, `seen` among them
    outcome.expect(0)
    assert "TARGET_FOLDER" in seen.read_text()


# --- where it goes ---


def test_target_with_spaces_and_below_a_new_folder(download: Download) -> None:
    download.target = download.folder / "my models" / "llama  2"
    outcome = download.run(TARGET_FOLDER=str(download.target))
    outcome.expect(0)
    assert download.files() == tree_of("7b")
    assert download.run().status == 0


@pytest.mark.parametrize("target", [None, "below", "-rf"])
def test_target_is_relative_to_the_current_folder(any_download: Download, target: str | None) -> None:
    here = any_download.folder / "here"
    here.mkdir()
    any_download.target = here / (target or "")
    outcome = any_download.run(cwd=here, TARGET_FOLDER=target)
    outcome.expect(0)
    assert any_download.files() == tree_of("7b")


def test_licence_of_this_library_is_left_alone(any_download: Download) -> None:
    script = any_download.target / "download.sh"
    shutil.copy(SCRIPT, script)
    any_download.put("LICENSE", b"MIT")
    any_download.script = script
    outcome = any_download.run(cwd=any_download.target, TARGET_FOLDER=None)
    outcome.expect(0)
    files = any_download.files()
    assert files["LICENSE"] == b"MIT"
    assert files["LICENSE-llama-2"] == TREE["LICENSE"]


def test_target_that_cannot_be_made(any_download: Download) -> None:
    (any_download.folder / "file").write_bytes(b"")
    outcome = any_download.run(TARGET_FOLDER=str(any_download.folder / "file" / "below"))
    outcome.expect(1, "cannot make, or write to, the folder")
    assert any_download.server.requests == []


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_SIZE // 2, SHARD_SIZE // 2))


def test_full_disk(download: Download) -> None:
    # A limit on the size of a file stands for a full disk: Python ignores SIGXFSZ, and so do its children then.
    process = download.start(preexec_fn=limit_file_size, restore_signals=False)
    outcome = download.finish(process)
    outcome.expect(1, "Is the disk full")
    assert download.server.ranges(SHARD) == [None]
    assert download.run().status == 0
    assert download.files() == tree_of("7b")


# --- interrupted downloads ---


def test_cut_connection_is_resumed(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000)
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == [None, "bytes=60000-"]
    assert download.files() == tree_of("7b")


def test_next_run_resumes(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000, times=3)
    outcome = download.run(RETRIES="1")
    outcome.expect(1, "breaks off", "Run this again")
    assert download.files() == without(tree_of("7b"), SHARD) | {f"{SHARD}.part": TREE[SHARD][:60_000]}
    download.server.faults.clear()
    download.server.requests.clear()
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == ["bytes=60000-"]
    assert set(download.server.paths()) == {SHARD, "llama-2-7b/checklist.chk"}
    assert download.files() == tree_of("7b")


def test_only_failures_without_a_byte_gained_count(download: Download) -> None:
    cuts = (20_000, 40_000, 60_000)
    for at in cuts:
        download.server.fault(SHARD, cut_at=at)
        download.server.fault(SHARD, status=503)
    outcome = download.run(RETRIES="1")
    outcome.expect(0)
    assert download.server.ranges(SHARD) == [None, *(f"bytes={at}-" for at in cuts for _ in range(2))]


def test_cut_small_files(download: Download) -> None:
    download.start_empty()
    for path in COMMON:
        download.server.fault(path, cut_at=4)
    outcome = download.run()
    outcome.expect(0)
    assert download.files() == tree_of("7b")


def test_server_that_ignores_range(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000)
    download.server.fault(SHARD, ignore_range=True, times=9)
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD)[1] == "bytes=60000-"
    assert download.files() == tree_of("7b")


def test_server_that_ignores_range_and_always_cuts(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000, ignore_range=True, times=99)
    outcome = download.run()
    outcome.expect(1, "breaks off")
    assert len(download.server.ranges(SHARD)) <= 8


def test_silent_connection_is_given_up_and_resumed(download: Download) -> None:
    download.server.fault(SHARD, hang_at=1000)
    outcome = download.run(STALL_SECONDS="1", RETRIES="20")
    outcome.expect(0)
    ranges = download.server.ranges(SHARD)
    assert ranges[0] is None and len(ranges) > 1  # on a busy machine the second one, too, may be too slow
    assert download.files() == tree_of("7b")


def test_interrupt_leaves_it_resumable(download: Download) -> None:
    download.server.fault(SHARD, hang_at=100_000)
    process = download.start()
    assert download.server.hanging.wait(HANG_S)
    part = download.target / f"{SHARD}.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    outcome = download.finish(process)
    outcome.expect(130, "Interrupted")
    size = part.stat().st_size
    assert download.files() == without(tree_of("7b"), SHARD) | {f"{SHARD}.part": TREE[SHARD][:size]}
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == [None, f"bytes={size}-"]
    assert download.files() == tree_of("7b")


@pytest.mark.parametrize("body", [TREE[SHARD], TREE[SHARD] + b"too long"])
def test_part_that_is_as_long_as_the_file_or_longer(download: Download, body: bytes) -> None:
    download.put(f"{SHARD}.part", body)
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == [f"bytes={len(body)}-"] + ([None] if body != TREE[SHARD] else [])
    assert download.files() == tree_of("7b")


def test_truncated_file_under_its_final_name_is_resumed(download: Download) -> None:
    download.put(SHARD, TREE[SHARD][:70_000])
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == ["bytes=70000-"]
    assert download.files() == tree_of("7b")


# --- refusals ---


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (403, ["expired", "used up", "Ask for a new one at https://"]),
        (401, ["expired"]),
        (404, ["no such file", "compare the name"]),
        (400, ["Copy it whole"]),
    ],
)
def test_refused_link(download: Download, status: int, says: list[str]) -> None:
    download.server.fault(CHAT_7B[1], status=status, times=99)
    outcome = download.run(MODEL_SIZE="7B,7B-chat")
    assert outcome.status == 1
    assert all(words in outcome.output for words in [*says, CHAT_7B[1], str(status)]), outcome.output
    assert download.server.ranges(CHAT_7B[1]) == [None]  # it was not tried again
    assert download.files() == without(tree_of("7b", "7b-chat"), CHAT_7B[1])


def test_new_link_after_the_old_one_expired_in_the_middle(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000)
    download.server.fault(SHARD, status=403)
    assert "expired" in download.run().output
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == [None, "bytes=60000-", "bytes=60000-"]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_trouble_of_the_server_is_waited_out(download: Download, status: int) -> None:
    download.server.fault(SHARD, status=status, times=2)
    outcome = download.run()
    outcome.expect(0)
    assert len(download.server.ranges(SHARD)) == 3
    assert f"status {status}" in outcome.output
    assert download.files() == tree_of("7b")


def test_trouble_of_the_server_that_lasts(download: Download) -> None:
    download.server.fault(SHARD, status=503, times=99)
    outcome = download.run()
    outcome.expect(1, "Try again later")
    assert len(download.server.ranges(SHARD)) == 3
    assert download.files() == without(tree_of("7b"), SHARD)


def test_delay_doubles_and_starts_again_after_progress(any_download: Download) -> None:
    slept = any_download.folder / "slept"
    any_download.install("sleep", f'printf "%s " "$1" >>"{slept}"')
    any_download.server.fault(SHARD, status=503, times=6)
    any_download.server.fault(SHARD, cut_at=60_000)
    any_download.server.fault(SHARD, status=503, times=2)
    outcome = any_download.run(RETRIES="6", RETRY_DELAY="3")
    outcome.expect(0)
    assert slept.read_text().split() == ["3", "6", "12", "24", "48", "60", "3", "6", "12"]


def test_no_network(download: Download) -> None:
    with socket.socket() as bound:  # bound but not listening: whoever connects is refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/*?{QUERY}"
        outcome = download.run(PRESIGNED_URL=url)
    outcome.expect(1, "cannot be reached", "proxy")
    assert outcome.output.count("trying again") == 2
    assert download.files() == without(tree_of("7b"), SHARD)


@pytest.mark.parametrize(
    ("curl_status", "wget_status", "says"),
    [(60, 5, "certificate is not trusted"), (2, 2, "does not work here"), (127, 127, "cannot be started")],
)
def test_failures_on_this_side_are_not_tried_again(
    download: Download, curl_status: int, wget_status: int, says: str
) -> None:
    if (download.bin / "curl").exists():
        download.install("curl", f"printf 000; exit {curl_status}")
    else:
        download.install("wget", f'[ "$1" = --help ] && echo --input-file\nexit {wget_status}')
    outcome = download.run()
    outcome.expect(1, says)
    assert "trying again" not in outcome.output


# --- checksums ---


@pytest.mark.parametrize("tool", ["md5sum", "md5"])
def test_corrupt_file_is_fetched_once_more(download: Download, tool: str) -> None:
    download.install_md5(tool)
    download.server.fault(SHARD, body=b"x" * SHARD_SIZE)
    outcome = download.run()
    outcome.expect(0)
    assert "corrupt" in outcome.output
    assert download.server.ranges(SHARD) == [None, None]
    assert download.files() == tree_of("7b")


@pytest.mark.parametrize("tool", ["md5sum", "md5"])
@pytest.mark.parametrize("path", [SHARD, "llama-2-7b/params.json", "tokenizer.model"])
def test_file_that_stays_corrupt(any_download: Download, tool: str, path: str) -> None:
    any_download.install_md5(tool)
    any_download.put(SHARD, TREE[SHARD])
    (any_download.target / path).unlink()
    any_download.server.fault(path, body=b"<html>log in first</html>", times=99)
    outcome = any_download.run()
    outcome.expect(1, f"{path}: corrupt twice")
    assert any_download.server.ranges(path) == [None, None]
    assert not any_download.files().keys() & {path, f"{path}.part"}
    assert any_download.files().items() <= TREE.items()


@pytest.mark.parametrize("part", [b"x" * 60_000, b"x" * SHARD_SIZE])
def test_corrupt_part_is_replaced(download: Download, part: bytes) -> None:
    download.put(f"{SHARD}.part", part)
    outcome = download.run()
    outcome.expect(0)
    assert download.server.ranges(SHARD) == [f"bytes={len(part)}-", None]
    assert download.files() == tree_of("7b")


@pytest.mark.parametrize("tool", ["md5sum", "md5"])
def test_verified_files_are_skipped(download: Download, tool: str) -> None:
    download.install_md5(tool)
    download.put_all(tree_of("7b", "13b"))
    outcome = download.run(MODEL_SIZE="7B,13B")
    outcome.expect(0)
    assert outcome.output.count("already verified") == 6
    assert download.server.requests == []


@pytest.mark.parametrize("tool", ["md5sum", "md5"])
def test_damaged_file_is_the_only_one_fetched_again(any_download: Download, tool: str) -> None:
    any_download.install_md5(tool)
    any_download.start_empty()
    any_download.put_all(tree_of("13b"))
    damaged = "llama-2-13b/consolidated.01.pth"
    any_download.put(damaged, TREE[damaged][:-1] + b"?")
    assert any_download.run(MODEL_SIZE="13B").status == 0
    assert any_download.server.paths() == ["llama-2-13b/checklist.chk", damaged, damaged]  # 416, then whole
    assert any_download.files() == tree_of("13b")


def test_damaged_checklist_condemns_no_good_file(any_download: Download) -> None:
    any_download.put(SHARD, TREE[SHARD])
    any_download.put("llama-2-7b/checklist.chk", TREE["llama-2-7b-chat/checklist.chk"])
    assert any_download.run().status == 0
    assert any_download.server.paths() == ["llama-2-7b/checklist.chk"]
    assert any_download.files() == tree_of("7b")


def test_login_page_in_place_of_the_checklist(any_download: Download) -> None:
    any_download.put("llama-2-7b/checklist.chk", b"the old one")
    any_download.server.tree["llama-2-7b/checklist.chk"] = b"<html>Welcome! <b>Log in</b> first.</html>"
    outcome = any_download.run()
    outcome.expect(1, "is no checklist")
    assert any_download.files()["llama-2-7b/checklist.chk"] == b"the old one"
    assert SHARD not in any_download.server.paths()


def test_checklist_that_lacks_a_file(any_download: Download) -> None:
    lines = TREE["llama-2-7b/checklist.chk"].splitlines(keepends=True)
    any_download.server.tree["llama-2-7b/checklist.chk"] = lines[1]
    outcome = any_download.run()
    outcome.expect(1, "is no checklist")


def test_checklist_in_other_dress(any_download: Download) -> None:
    text = TREE["llama-2-7b/checklist.chk"].decode()
    lines = [line.split() for line in text.splitlines()]
    dressed = "other line\r\n" + "\r\n".join(f"{md5} *./{name}" for md5, name in lines)
    any_download.server.tree["llama-2-7b/checklist.chk"] = dressed.encode()
    outcome = any_download.run()
    outcome.expect(0)
    assert any_download.files() == tree_of("7b") | {"llama-2-7b/checklist.chk": dressed.encode()}


@pytest.mark.parametrize("tool", ["md5sum", "md5"])
def test_failing_checksum_tool_costs_no_file(any_download: Download, tool: str) -> None:
    any_download.put(SHARD, TREE[SHARD])
    any_download.install_md5(tool)
    any_download.install(tool, "exit 1")
    outcome = any_download.run()
    outcome.expect(1, f"{tool} could not read")
    assert any_download.files() == tree_of("7b")


def test_missing_tools_are_named_before_anything_is_fetched(any_download: Download) -> None:
    for tool in ("md5sum", "md5"):
        (any_download.bin / tool).unlink(missing_ok=True)
    outcome = any_download.run()
    outcome.expect(1, "neither md5sum nor md5")
    for tool in ("curl", "wget"):
        (any_download.bin / tool).unlink(missing_ok=True)
    outcome = any_download.run()
    outcome.expect(1, "neither curl nor wget")
    for text in ("BusyBox v1.35.0 multi-call binary. Usage: wget [-cqS] URL...", "GNU Wget2 2.1.0 --input-file"):
        any_download.install("wget", f"echo '{text}' >&2")
        outcome = any_download.run()
        outcome.expect(1, "Install curl or GNU wget")
    assert any_download.server.requests == []


# --- disk space ---


def install_df(download: Download, free_kib: int) -> None:
    download.env["SKIP_SPACE_CHECK"] = "0"
    download.install(
        "df",
        'echo "Filesystem 1024-blocks Used Available Capacity Mounted on"\n'
        f'echo "map auto home  976490576 123456 {free_kib}     3% /Volumes/My 5% Disk"',
    )


GIB = 1024 * 1024  # in KiB


@pytest.mark.parametrize(
    ("models", "gib"), [("7B", 13), ("13B-chat", 25), ("70B", 130), ("7B,13B,70B", 168), (" All ", 336)]
)
def test_too_little_space(any_download: Download, models: str, gib: int) -> None:
    install_df(any_download, gib * GIB - 1)
    outcome = any_download.run(MODEL_SIZE=models)
    outcome.expect(1, "not enough disk space", f"about {gib} GB are still to come")
    assert f"{gib - 1} GB are free" in outcome.output
    assert any_download.server.requests == []


def test_enough_space(any_download: Download) -> None:
    install_df(any_download, 13 * GIB)
    outcome = any_download.run()
    outcome.expect(0)


def test_only_what_is_missing_needs_space(any_download: Download) -> None:
    for shard in range(6):
        any_download.put(f"llama-2-70b/consolidated.0{shard}.pth", b"")
    part = any_download.target / "llama-2-70b/consolidated.06.pth.part"
    part.touch()
    os.truncate(part, 1024**3)  # sparse
    install_df(any_download, 2 * 130 * GIB // 8 - GIB - 1)
    assert "about 32 GB are still to come" in any_download.run(MODEL_SIZE="70B").output
    part.unlink()
    assert "about 33 GB are still to come" in any_download.run().output
    assert any_download.server.requests == []


def test_space_that_cannot_be_read_is_only_a_warning(any_download: Download) -> None:
    any_download.env["SKIP_SPACE_CHECK"] = "0"
    any_download.install("df", "exit 1")
    outcome = any_download.run()
    outcome.expect(0, "could not be read")
    assert any_download.files() == tree_of("7b")


def test_real_df_is_understood(any_download: Download) -> None:
    outcome = any_download.run(SKIP_SPACE_CHECK="0")
    assert "could not be read" not in outcome.output
    assert outcome.status == 0 or "not enough disk space" in outcome.output


# --- at a terminal ---


@pytest.fixture
def terminal(any_download: Download) -> Iterator[Terminal]:
    del any_download.env["PRESIGNED_URL"], any_download.env["MODEL_SIZE"]
    terminal = Terminal(any_download)
    terminal.wait_for("not shown")
    wait_until(lambda: not terminal.echoes)
    yield terminal
    terminal.close()


def test_questions_at_a_terminal(terminal: Terminal, any_download: Download) -> None:
    url = any_download.server.url
    terminal.type(f"{url[:70]}\n{url[70:]}\n")  # a link that was wrapped
    terminal.wait_for("Models to download")
    assert terminal.echoes
    terminal.type("7B\n")
    assert terminal.finish() == 0, terminal.shown
    any_download.check_secrecy(terminal.shown)
    assert any_download.files() == tree_of("7b")


def test_link_longer_than_a_terminals_line(terminal: Terminal, any_download: Download) -> None:
    any_download.server.query += "&more=" + "x" * 6000
    terminal.type(f"{any_download.server.url}\n")
    terminal.wait_for("Models to download")
    terminal.type("7B\n")
    assert terminal.finish() == 0, terminal.shown
    any_download.check_secrecy(terminal.shown)


def test_interrupt_at_the_question_gives_the_terminal_back(terminal: Terminal, any_download: Download) -> None:
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.finish() == 130
    assert terminal.echoes
    assert any_download.server.requests == []


def test_progress_is_shown_at_a_terminal_only(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000)
    download.server.fault(SHARD, status=503)
    terminal = Terminal(download)
    assert terminal.finish() == 0, terminal.shown
    terminal.close()
    assert " 40" in terminal.shown  # percent
    download.check_secrecy(terminal.shown)
    (download.target / SHARD).unlink()
    assert "100" not in download.run().output


# --- the text of the script ---


def test_shellcheck() -> None:
    subprocess.run([real_tool("shellcheck"), str(SCRIPT)], check=True)


CODE = {
    "CodeLlama-7b": ["consolidated.00.pth"],
    "CodeLlama-34b-Instruct": [f"consolidated.{i:02d}.pth" for i in range(4)],
}


def code_tree(model: str, *, tokenizer_is_listed: bool = True) -> dict[str, bytes]:
    """Each of Code Llama's folders has a tokenizer."""
    rng = random.Random(model)
    listed = {name: rng.randbytes(SHARD_SIZE) for name in CODE[model]} | {"params.json": b"{}"}
    tokenizer = {"tokenizer.model": rng.randbytes(3000)}
    checklist = checklist_of(listed | tokenizer if tokenizer_is_listed else listed)
    files = listed | tokenizer | {"checklist.chk": checklist}
    return {f"{model}/{name}": body for name, body in files.items()}


@pytest.mark.parametrize("answer", ["CodeLlama-7b,CodeLlama-34b-Instruct", "codellama-34B-instruct CODELLAMA-7B"])
@pytest.mark.parametrize("tokenizer_is_listed", [True, False])
def test_code_llama(any_download: Download, answer: str, tokenizer_is_listed: bool) -> None:
    any_download.start_empty()
    tree = {path: TREE[path] for path in ("LICENSE", "USE_POLICY.md")}
    for model in CODE:
        tree |= code_tree(model, tokenizer_is_listed=tokenizer_is_listed)
    any_download.server.tree = dict(tree)
    any_download.run(MODEL_SIZE=answer).expect(0)
    assert any_download.files() == tree


def test_code_llama_needs_as_much_space_as_it_has(any_download: Download) -> None:
    install_df(any_download, 63 * GIB - 1)
    outcome = any_download.run(MODEL_SIZE="CodeLlama-34b")
    outcome.expect(1, "about 63 GB are still to come")


@pytest.mark.parametrize("target", ["~/models", "~"])
def test_a_tilde_is_the_home_folder(any_download: Download, target: str) -> None:
    """In quotes the shell leaves it as it is, and a folder of that name was made."""
    any_download.target = any_download.home / target[2:]
    any_download.run(TARGET_FOLDER=target).expect(0)
    assert tree_of("7b").items() <= any_download.files().items()


def test_another_shell_hands_over_to_bash(any_download: Download) -> None:
    """As `sh download.sh` where sh is dash."""
    dash = real_tool("dash")
    assert any_download.bash
    bash = any_download.bash
    any_download.bash = dash
    any_download.run().expect(127, "bash is not installed")
    (any_download.bin / "bash").symlink_to(bash)
    any_download.run().expect(0)
    assert any_download.files() == tree_of("7b")

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
)
from tests.support.processes import wait_until

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")
CHECKLIST = "llama-2-7b/checklist.chk"


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
    """One for each downloader, for what differs between them."""
    if request.param == "wget" and not is_gnu_wget_1():
        pytest.skip("needs GNU wget 1")
    return Download(tmp_path, server, request.param)


@pytest.fixture
def any_download(tmp_path: Path, server: Server) -> Download:
    """One with whichever downloader is there, for what does not depend on it."""
    return Download(tmp_path, server, "wget" if is_gnu_wget_1() and not shutil.which("curl") else "curl")


# --- what is asked for ---


def test_all_models(download: Download) -> None:
    shutil.rmtree(download.target)
    download.run(MODEL_SIZE="")
    assert download.files() == TREE
    assert download.server.paths() == sorted(TREE)


@pytest.mark.parametrize(
    ("answer", "models"),
    [("7b-CHAT, 13B", ["7b-chat", "13b"]), ("13B-chat 7B", ["13b-chat", "7b"]), (",7B,,7B,\n", ["7b"])],
)
def test_some_models(any_download: Download, answer: str, models: list[str]) -> None:
    shutil.rmtree(any_download.target)
    any_download.run(MODEL_SIZE=answer)
    assert any_download.files() == tree_of(*models)
    assert any_download.server.paths() == sorted(any_download.files())


CODE = {"CodeLlama-7b": 1, "CodeLlama-34b-Instruct": 4}


@pytest.mark.parametrize("answer", ["CodeLlama-7b,CodeLlama-34b-Instruct", "codellama-34B-instruct CODELLAMA-7B"])
@pytest.mark.parametrize("tokenizer_is_listed", [True, False])
def test_code_llama_whose_folders_each_have_a_tokenizer(
    any_download: Download, answer: str, tokenizer_is_listed: bool
) -> None:
    shutil.rmtree(any_download.target)
    rng = random.Random(0)
    tree = {path: TREE[path] for path in ("LICENSE", "USE_POLICY.md")}
    for model, n_shards in CODE.items():
        files = {f"consolidated.{i:02d}.pth": rng.randbytes(SHARD_SIZE) for i in range(n_shards)}
        files |= {"params.json": b"{}", "tokenizer.model": rng.randbytes(3000)}
        listed = {name: body for name, body in files.items() if tokenizer_is_listed or name != "tokenizer.model"}
        files["checklist.chk"] = checklist_of(listed)
        tree |= {f"{model}/{name}": body for name, body in files.items()}
    any_download.server.tree = tree
    any_download.run(MODEL_SIZE=answer)
    assert any_download.files() == tree


def test_help(any_download: Download) -> None:
    for flag in ("-h", "--help"):
        any_download.run("PRESIGNED_URL", "MODEL_SIZE", "TARGET_FOLDER", "70B-chat", args=(flag,))


URL = f"https://127.0.0.1/*?{QUERY}"
ALL_MODELS = "7B,13B,70B,7B-chat,13B-chat,70B-chat"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        *(({"MODEL_SIZE": x}, ("unknown model", ALL_MODELS)) for x in ("7B,8B", "7B-base", "7B;13B", "*", "--help")),
        ({"MODEL_SIZE": URL}, ("no model name",)),
        *(({name: None}, (f"{name} is not set", "no terminal")) for name in ("PRESIGNED_URL", "MODEL_SIZE")),
        *(({name: x}, (name,)) for name, x in (("RETRIES", "-1"), ("RETRY_DELAY", "08"), ("STALL_SECONDS", "x"))),
        ({"PRESIGNED_URL": URL.replace("*", "LICENSE")}, ("no *",)),
        ({"PRESIGNED_URL": f"https://127.0.0.1/l.php?u=https%3A%2F%2Fexample%2F%2A%3F{QUERY}"}, ("no *",)),
        ({"PRESIGNED_URL": f"https://127.0.0.1/?{QUERY}*"}, ("no *",)),
        *(({"PRESIGNED_URL": x + URL[8:]}, ("does not begin with http",)) for x in ("", "ftp://")),
        ({"PRESIGNED_URL": ' "" '}, ("empty",)),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_fetched(
    any_download: Download, env: dict[str, str | None], says: tuple[str, ...]
) -> None:
    any_download.run(*says, status=2, **env)
    assert any_download.server.requests == []


def test_no_argument_is_taken_and_a_link_among_them_is_not_shown(any_download: Download) -> None:
    for argument in ("7B", any_download.server.url):
        any_download.run("only argument", args=(argument,), status=2)


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
    any_download.run(PRESIGNED_URL=paste.format(**forms))
    assert any_download.files() == tree_of("7b")


def test_link_is_in_no_argument_and_no_environment(download: Download) -> None:
    seen = download.folder / "seen"
    real = real_tool(download.downloader)
    download.install(download.downloader, f'{{ printf "%s\\n" "$@"; export -p; }} >>"{seen}"\nexec "{real}" "$@"')
    download.run(url="exported")  # looks for the link in every file, `seen` among them
    assert "TARGET_FOLDER" in seen.read_text()


# --- where it goes ---


@pytest.mark.parametrize(
    ("target", "goes_to"),
    [
        (None, "here"),
        ("below", "here/below"),
        ("-rf", "here/-rf"),
        ("new folder/llama  2", "here/new folder/llama  2"),
        ("~", "home"),
        ("~/models", "home/models"),
    ],
)
def test_target_is_relative_to_the_current_folder_or_the_home_folder(
    any_download: Download, target: str | None, goes_to: str
) -> None:
    here = any_download.folder / "here"
    here.mkdir()
    any_download.target = any_download.folder / goes_to
    for _ in range(2):
        any_download.run(cwd=here, TARGET_FOLDER=target)
        assert tree_of("7b").items() <= any_download.files().items()


def test_licence_of_this_library_is_left_alone(any_download: Download) -> None:
    any_download.script = any_download.target / "download.sh"
    shutil.copy(SCRIPT, any_download.script)
    any_download.put({"LICENSE": b"MIT"})
    any_download.run(cwd=any_download.target, TARGET_FOLDER=None)
    files = any_download.files()
    assert files["LICENSE"] == b"MIT"
    assert files["LICENSE-llama-2"] == TREE["LICENSE"]


def test_target_that_cannot_be_made(any_download: Download) -> None:
    target = any_download.folder / "file" / "below"
    target.parent.write_bytes(b"")
    any_download.run("cannot make, or write to, the folder", status=1, TARGET_FOLDER=str(target))
    assert any_download.server.requests == []


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_SIZE // 2, SHARD_SIZE // 2))


def test_full_disk(download: Download) -> None:
    # A limit on the size of a file stands for a full disk: Python ignores SIGXFSZ, and so do its children then.
    process = download.start(preexec_fn=limit_file_size, restore_signals=False)
    download.finish(process, "Is the disk full", status=1)
    assert download.server.ranges() == [None]
    download.run()
    assert download.files() == tree_of("7b")


# --- interrupted downloads ---


def test_next_run_resumes(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000, times=3)
    download.run("breaks off", "Run this again", status=1, RETRIES="1")
    assert download.files() == tree_of("7b", without=SHARD) | {f"{SHARD}.part": TREE[SHARD][:60_000]}
    download.server.faults.clear()
    download.server.requests.clear()
    download.run()
    assert download.server.ranges() == ["bytes=60000-"]
    assert download.server.paths() == [CHECKLIST, SHARD]
    assert download.files() == tree_of("7b")


def test_only_failures_without_a_byte_gained_count(download: Download) -> None:
    cuts = (20_000, 40_000, 60_000)
    for at in cuts:
        download.server.fault(SHARD, cut_at=at)
        download.server.fault(SHARD, status=503)
    download.run(RETRIES="1")
    assert download.server.ranges() == [None, *(f"bytes={at}-" for at in cuts for _ in range(2))]
    assert download.files() == tree_of("7b")


def test_cut_small_files(download: Download) -> None:
    shutil.rmtree(download.target)
    for path in TREE:
        if "/" not in path:
            download.server.fault(path, cut_at=4)
    download.run()
    assert download.files() == tree_of("7b")


def test_server_that_ignores_range(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000)
    download.server.fault(SHARD, ignore_range=True, times=9)
    download.run()
    assert download.server.ranges()[1] == "bytes=60000-"
    assert download.files() == tree_of("7b")


def test_server_that_ignores_range_and_always_cuts(download: Download) -> None:
    download.server.fault(SHARD, cut_at=60_000, ignore_range=True, times=99)
    download.run("breaks off", status=1)
    assert len(download.server.ranges()) <= 8


def test_silent_connection_is_given_up_and_resumed(download: Download) -> None:
    download.server.fault(SHARD, hang_at=1000)
    download.run(STALL_SECONDS="1", RETRIES="20")
    ranges = download.server.ranges()
    assert ranges[0] is None and len(ranges) > 1  # on a busy machine the second one, too, may be too slow
    assert download.files() == tree_of("7b")


def test_interrupt_leaves_it_resumable(download: Download) -> None:
    download.server.fault(SHARD, hang_at=100_000)
    process = download.start()
    assert download.server.hanging.wait(HANG_S)
    part = download.target / f"{SHARD}.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 0, HANG_S)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    download.finish(process, "Interrupted", status=130)
    size = part.stat().st_size
    assert download.files() == tree_of("7b", without=SHARD) | {f"{SHARD}.part": TREE[SHARD][:size]}
    download.run()
    assert download.server.ranges() == [None, f"bytes={size}-"]
    assert download.files() == tree_of("7b")


@pytest.mark.parametrize(
    ("suffix", "held", "is_fetched_anew"),
    [
        (".part", TREE[SHARD], False),
        (".part", TREE[SHARD] + b"too long", True),
        (".part", b"x" * 60_000, True),
        (".part", b"x" * SHARD_SIZE, True),
        ("", TREE[SHARD][:70_000], False),
    ],
    ids=["whole", "too long", "corrupt", "whole but corrupt", "truncated under its final name"],
)
def test_what_is_there_is_resumed_and_fetched_anew_if_it_is_corrupt(
    download: Download, suffix: str, held: bytes, is_fetched_anew: bool
) -> None:
    download.put({SHARD + suffix: held})
    download.run()
    assert download.server.ranges() == [f"bytes={len(held)}-"] + [None] * is_fetched_anew
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
def test_refused_link_is_not_tried_again_and_a_new_one_resumes(
    download: Download, status: int, says: list[str]
) -> None:
    path = "llama-2-7b-chat/consolidated.00.pth"
    download.server.fault(path, cut_at=60_000)
    download.server.fault(path, status=status)
    download.run(*says, path, str(status), status=1, MODEL_SIZE="7B,7B-chat")
    assert download.files() == tree_of("7b", "7b-chat", without=path) | {f"{path}.part": TREE[path][:60_000]}
    download.run()
    assert download.server.ranges(path) == [None, "bytes=60000-", "bytes=60000-"]
    assert download.files() == tree_of("7b", "7b-chat")


def test_trouble_of_the_server_is_waited_out(download: Download) -> None:
    for status in (500, 429, 503):
        download.server.fault(SHARD, status=status)
    download.run("status 500", "status 429", "status 503", RETRIES="3")
    assert len(download.server.ranges()) == 4
    assert download.files() == tree_of("7b")


def test_trouble_of_the_server_that_lasts(download: Download) -> None:
    download.server.fault(SHARD, status=503, times=99)
    download.run("Try again later", status=1)
    assert len(download.server.ranges()) == 3
    assert download.files() == tree_of("7b", without=SHARD)


def test_delay_doubles_and_starts_again_after_progress(any_download: Download) -> None:
    slept = any_download.folder / "slept"
    any_download.install("sleep", f'printf "%s " "$1" >>"{slept}"')
    any_download.server.fault(SHARD, status=503, times=6)
    any_download.server.fault(SHARD, cut_at=60_000)
    any_download.server.fault(SHARD, status=503, times=2)
    any_download.run(RETRIES="6", RETRY_DELAY="3")
    assert slept.read_text().split() == ["3", "6", "12", "24", "48", "60", "3", "6", "12"]


def test_no_network(download: Download) -> None:
    with socket.socket() as bound:  # bound but not listening: whoever connects is refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/*?{QUERY}"
        output = download.run("cannot be reached", "proxy", status=1, PRESIGNED_URL=url)
    assert output.count("trying again") == 2
    assert download.files() == tree_of("7b", without=SHARD)


@pytest.mark.parametrize(
    ("curl_status", "wget_status", "says"),
    [(60, 5, "certificate is not trusted"), (2, 2, "does not work here"), (127, 127, "cannot be started")],
)
def test_failures_on_this_side_are_not_tried_again(
    download: Download, curl_status: int, wget_status: int, says: str
) -> None:
    if download.downloader == "curl":
        download.install("curl", f"printf 000; exit {curl_status}")
    else:
        download.install("wget", f'[ "$1" = --help ] && echo --input-file\nexit {wget_status}')
    assert "trying again" not in download.run(says, status=1)


# --- checksums ---


@pytest.mark.parametrize("tool", ["md5sum", "md5"])
def test_corrupt_file_is_fetched_once_more_and_verified_files_are_skipped(any_download: Download, tool: str) -> None:
    any_download.install_md5(tool)
    any_download.server.fault(SHARD, body=b"x" * SHARD_SIZE)
    any_download.run("corrupt")
    assert any_download.server.ranges() == [None, None]
    assert any_download.files() == tree_of("7b")
    any_download.put(tree_of("7b", "13b"))
    any_download.server.requests.clear()
    assert any_download.run(MODEL_SIZE="7B,13B").count("already verified") == 6
    assert any_download.server.requests == []
    any_download.install(tool, "exit 1")
    any_download.run(f"{tool} could not read", status=1)
    assert any_download.files() == tree_of("7b", "13b"), "a tool that fails costs no file"


@pytest.mark.parametrize("path", [SHARD, "llama-2-7b/params.json", "tokenizer.model"])
def test_file_that_stays_corrupt(any_download: Download, path: str) -> None:
    any_download.put({SHARD: TREE[SHARD]})
    (any_download.target / path).unlink()
    any_download.server.fault(path, body=b"<html>log in first</html>", times=99)
    any_download.run(f"{path}: corrupt twice", status=1)
    assert any_download.server.ranges(path) == [None, None]
    assert any_download.files() == tree_of("7b", without=path)


def test_damaged_file_is_the_only_one_fetched_again(any_download: Download) -> None:
    damaged = "llama-2-13b/consolidated.01.pth"
    any_download.put(tree_of("7b", "13b") | {damaged: TREE[damaged][:-1] + b"?"})
    any_download.run(MODEL_SIZE="13B")
    assert any_download.server.paths() == ["llama-2-13b/checklist.chk", damaged, damaged]  # 416, then whole
    assert any_download.files() == tree_of("7b", "13b")


def test_damaged_checklist_condemns_no_good_file(any_download: Download) -> None:
    any_download.put({SHARD: TREE[SHARD], CHECKLIST: TREE["llama-2-7b-chat/checklist.chk"]})
    any_download.run()
    assert any_download.server.paths() == [CHECKLIST]
    assert any_download.files() == tree_of("7b")


@pytest.mark.parametrize("came", [b"<html>Log in first.</html>", TREE[CHECKLIST].splitlines(keepends=True)[1]])
def test_a_login_page_or_half_a_checklist_replaces_no_checklist(any_download: Download, came: bytes) -> None:
    any_download.put({CHECKLIST: b"the old one"})
    any_download.server.tree[CHECKLIST] = came
    any_download.run("is no checklist", status=1)
    assert any_download.files()[CHECKLIST] == b"the old one"
    assert SHARD not in any_download.server.paths()


def test_checklist_in_other_dress(any_download: Download) -> None:
    lines = [line.split() for line in TREE[CHECKLIST].decode().splitlines()]
    dressed = ("other line\r\n" + "\r\n".join(f"{md5} *./{name}" for md5, name in lines)).encode()
    any_download.server.tree[CHECKLIST] = dressed
    any_download.run()
    assert any_download.files() == tree_of("7b") | {CHECKLIST: dressed}


def test_missing_tools_are_named_before_anything_is_fetched(any_download: Download) -> None:
    any_download.remove_tools("md5sum", "md5")
    any_download.run("neither md5sum nor md5", status=1)
    any_download.remove_tools("curl", "wget")
    any_download.run("neither curl nor wget", status=1)
    for text in ("BusyBox v1.35.0 multi-call binary. Usage: wget [-cqS] URL...", "GNU Wget2 2.1.0 --input-file"):
        any_download.install("wget", f"echo '{text}' >&2")
        any_download.run("Install curl or GNU wget", status=1)
    assert any_download.server.requests == []


def test_another_shell_hands_over_to_bash(any_download: Download) -> None:
    """As `sh download.sh` where sh is dash."""
    bash, any_download.bash = any_download.bash, real_tool("dash")
    any_download.run("bash is not installed", status=127)
    (any_download.bin / "bash").symlink_to(bash)
    any_download.run()
    assert any_download.files() == tree_of("7b")


# --- disk space ---

GIB = 1024 * 1024  # in KiB


def install_df(download: Download, free_kib: int) -> None:
    download.env["SKIP_SPACE_CHECK"] = "0"
    download.install(
        "df",
        'echo "Filesystem 1024-blocks Used Available Capacity Mounted on"\n'
        f'echo "map auto home  976490576 123456 {free_kib}     3% /Volumes/My 5% Disk"',
    )


def test_too_little_space_is_an_error_before_anything_is_fetched(any_download: Download) -> None:
    sizes = {"7B": 13, "13B-chat": 25, "70B": 130, "7B,13B,70B": 168, " All ": 336, "CodeLlama-34b": 63}
    for models, gib in sizes.items():
        install_df(any_download, gib * GIB - 1)
        says = ("not enough disk space", f"about {gib} GB are still to come", f"{gib - 1} GB are free")
        any_download.run(*says, status=1, MODEL_SIZE=models)
    assert any_download.server.requests == []
    install_df(any_download, 13 * GIB)
    any_download.run(MODEL_SIZE="7B")


def test_only_what_is_missing_needs_space(any_download: Download) -> None:
    any_download.put({f"llama-2-70b/consolidated.0{shard}.pth": b"" for shard in range(6)})
    part = any_download.target / "llama-2-70b/consolidated.06.pth.part"
    part.touch()
    os.truncate(part, 1024**3)  # sparse
    install_df(any_download, 2 * 130 * GIB // 8 - GIB - 1)
    any_download.run("about 32 GB are still to come", status=1, MODEL_SIZE="70B")
    part.unlink()
    any_download.run("about 33 GB are still to come", status=1)


def test_space_that_cannot_be_read_is_only_a_warning(any_download: Download) -> None:
    any_download.install("df", "exit 1")
    any_download.run("could not be read", SKIP_SPACE_CHECK="0")
    assert any_download.files() == tree_of("7b")


def test_real_df_is_understood(any_download: Download) -> None:
    any_download.env["SKIP_SPACE_CHECK"] = "0"
    output, _ = any_download.start().communicate(timeout=HANG_S)
    assert "could not be read" not in output
    assert "verified" in output or "not enough disk space" in output


# --- at a terminal ---


@pytest.fixture
def terminal(any_download: Download) -> Iterator[Terminal]:
    del any_download.env["PRESIGNED_URL"], any_download.env["MODEL_SIZE"]
    terminal = Terminal(any_download)
    terminal.wait_for("not shown")
    wait_until(lambda: not terminal.echoes, HANG_S)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("wrapped_at", [70, 5000])
def test_a_wrapped_link_longer_than_a_terminals_line_is_read_unseen(
    terminal: Terminal, any_download: Download, wrapped_at: int
) -> None:
    any_download.server.query += "&more=" + "x" * 6000
    url = any_download.server.url
    terminal.type(f"{url[:wrapped_at]}\n{url[wrapped_at:]}\n")
    terminal.wait_for("Models to download")
    assert terminal.echoes
    terminal.type("7B\n")
    assert terminal.finish() == 0, terminal.shown
    any_download.check_secrecy(terminal.shown)
    assert any_download.files() == tree_of("7b")


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
    assert "100" not in download.run()


def test_shellcheck() -> None:
    subprocess.run([real_tool("shellcheck"), str(SCRIPT)], check=True)

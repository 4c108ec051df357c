"""The chat page in a headless Chromium, on a server with the toy checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.support.browser import CHROMIUM, Page, open_page
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; install the system's package chromium")
TOY = ROOT / "tiny-llama"
INPUT = "document.getElementById('input')"
SETTLED = "document.querySelectorAll('.meta').length === {n} && !running"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcesses]:
    server = ServerProcesses(TOY, TOY / "tokenizer.model", "--max_seq_len", "256")
    yield server
    assert server.terminate() == [0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_page() as page:
        yield page
        assert page.errors == []


@pytest.fixture
def page(browser: Page, server: ServerProcesses) -> Page:
    """The page, with nothing remembered."""
    browser.size(1200, 800)
    browser.open(f"{server.url}/")
    browser.js("localStorage.clear()")
    browser.open(f"{server.url}/?")
    browser.wait("document.title === 'tiny-llama'")
    browser.js("document.getElementById('temperature').value = 0; document.getElementById('temperature').oninput()")
    return browser


def ask(page: Page, text: str) -> None:
    page.js(f"{INPUT}.focus()")
    page.type(text)
    page.press("Enter")


def shown(page: Page, what: str) -> list[str]:
    texts: list[str] = page.js(f"[...document.querySelectorAll({what!r})].map((node) => node.innerText)")
    return texts


def test_a_chat_is_streamed_counted_regenerated_and_remembered(page: Page, server: ServerProcesses) -> None:
    page.js("document.getElementById('system').value = 'Be brief.'; document.getElementById('system').oninput()")
    ask(page, "Where do llamas live?")
    page.wait(SETTLED.format(n=1))
    (answer,) = shown(page, ".answer")
    assert answer
    (count,) = shown(page, ".count")
    assert "tokens of 256" in count
    page.press("r", "KeyR", alt=True)
    page.wait(f"{SETTLED.format(n=1)} && document.querySelector('.count').textContent")
    assert shown(page, ".answer") == [answer], "greedy: the same again"
    ask(page, "And alpacas?")
    page.wait(SETTLED.format(n=2))
    sent = page.js("messagesFor(currentChat(), currentChat().turns[1])")
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    before = shown(page, ".answer")
    page.open(f"{server.url}/")
    page.wait("document.title === 'tiny-llama'")
    assert shown(page, ".answer") == before
    assert page.js("document.getElementById('system').value") == "Be brief."
    page.press("n", "KeyN", alt=True)
    assert shown(page, ".answer") == []
    assert len(shown(page, "#chats li")) == 2


def test_escape_stops_an_answer_and_keeps_what_has_come(page: Page, server: ServerProcesses) -> None:
    # A stream that never ends by itself, as a slow network would be.
    page.js("""
        window.fetchBefore = window.fetch;
        window.fetch = async (path, options) => path.endsWith("completions") ? new Response(new ReadableStream({
            start(stream) {
                const chunk = { choices: [{ index: 0, delta: { content: "so far" }, finish_reason: null }] };
                stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
                options.signal.onabort = () => stream.error(new DOMException("stopped", "AbortError"));
            },
        })) : window.fetchBefore(path, options);
    """)
    ask(page, "Where do llamas live?")
    page.wait("document.querySelector('.answer').innerText === 'so far'")
    assert shown(page, "#send") == ["Stop"]
    page.press("Escape")
    page.wait(SETTLED.format(n=1))
    assert shown(page, ".answer") == ["so far"]
    assert shown(page, ".error") == []
    assert shown(page, "#send") == ["Send"]
    server.wait_until_idle()


def test_errors_of_the_server_show_and_nothing_is_taken_for_html(page: Page) -> None:
    ask(page, "A tag: [INST]")
    page.wait(SETTLED.format(n=1))
    (error,) = shown(page, ".error")
    assert error.startswith("messages[0].content must not contain the chat template's tags")
    ask(page, "<img src=x onerror='window.broken = 1'>")  # without the turn that failed
    page.wait(SETTLED.format(n=2))
    assert len(shown(page, ".error")) == 1
    page.js(
        "currentChat().turns[1].answer = '<b>bold</b> `x`\\n```html\\n<script>window.broken = 1</script>\\n```'; show()"
    )
    assert page.js("window.broken") is None
    assert shown(page, ".code code") == ["<script>window.broken = 1</script>"]
    assert shown(page, "#log b") == []
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.js("document.querySelector('.code button').click()")
    page.wait("window.copied")
    assert page.js("window.copied") == "<script>window.broken = 1</script>"


def test_it_fits_a_phone_and_both_themes(page: Page) -> None:
    ask(page, "x" * 200 + " `" + "y" * 200 + "`")
    page.wait(SETTLED.format(n=1))
    page.size(360, 700, mobile=True)
    assert page.js("document.documentElement.scrollWidth") <= 360
    assert page.js("document.getElementById('send').getBoundingClientRect().right") <= 360
    page.js("document.getElementById('menu').click()")
    page.wait("getComputedStyle(document.getElementById('side')).visibility === 'visible'")
    colors = []
    for _ in range(2):
        page.js("document.getElementById('theme').click()")
        colors.append(page.js("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colors)) == 2
    assert json.loads(page.js("localStorage.getItem('llama-chats')"))["theme"] in ("dark", "light")

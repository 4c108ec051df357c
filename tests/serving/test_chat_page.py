"""The chat page in a headless Chromium, on a server with the toy checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.support.browser import CHROMIUM, Page, open_page
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; install the system's package chromium")
TOY = ROOT / "tiny-llama"
STATIC = ROOT / "llama" / "serving" / "static"
SETTLED = "document.querySelectorAll('.meta').length === {n} && !document.querySelector('.answer.busy')"
MARKDOWN = """# Llamas

Some **bold**, *slanted* and `inline` words, and a [link](https://example.org/llama).

1. one
2. two
   - nested

| animal | kg |
| --- | ---: |
| llama | 150 |

```python
def greet(name):
    return f"hello {name}"  # a comment
```
"""
HOSTILE = """<img src=x onerror="window.broken = 1"><script>window.broken = 1</script> <b>bold</b>
[a](javascript:window.broken=1) [b](https://example.org/" onmouseover="window.broken=1) ![pixel](https://example.org/p.png)

```html"onload=window.broken=1
<script>window.broken = 1</script>
```

<svg/onload=window.broken=1><style>* { display: none }</style><iframe src="https://example.org"></iframe>
"""
# Streams that the test feeds, piece by piece, in the place of the server's; `feed(text)` goes to the newest.
FED = """
    window.realFetch ||= window.fetch;
    window.streams = [];
    window.feed = (text, stream = window.streams.at(-1)) => stream.enqueue(new TextEncoder().encode(
        `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content: text }, finish_reason: null }] })}\\n\\n`));
    window.end = (stream = window.streams.at(-1)) => {
        stream.enqueue(new TextEncoder().encode("data: [DONE]\\n\\n"));
        stream.close();
    };
    window.fetch = async (path, options) => path.endsWith("completions") ? new Response(new ReadableStream({
        start(stream) {
            window.streams.push(stream);
            options.signal.addEventListener("abort", () => stream.error(new DOMException("stopped", "AbortError")));
        },
    })) : window.realFetch(path, options);
"""


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
    """The page, with nothing remembered but that answers are greedy."""
    browser.size(1200, 800)
    browser.open(f"{server.url}/health")
    browser.js(
        "new Promise((done) => { indexedDB.deleteDatabase('llama-chats').onsuccess = done; sessionStorage.clear(); "
        "localStorage.setItem('llama-settings', '{\"temperature\": 0}') })"
    )
    return load(browser, f"{server.url}/")


def load(page: Page, url: str) -> Page:
    page.open("about:blank")
    page.open(url)
    page.wait("document.title === 'tiny-llama'")
    return page


def ask(page: Page, text: str) -> None:
    page.js("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter")


def ask_and_feed(page: Page, question: str, *pieces: str) -> None:
    """Asks, and streams the pieces as the whole answer."""
    page.js(FED)
    ask(page, question)
    page.wait("window.streams.length")
    for piece in pieces:
        page.js(f"window.feed({json.dumps(piece)})")
    page.js("window.end()")
    page.wait(SETTLED.format(n=1))


def click(page: Page, selector: str, text: str = "") -> None:
    """Clicks the only element that is selected, or the one with this text."""
    page.js(f"""{{
        const found = [...document.querySelectorAll({selector!r})].filter((node) => node.innerText.includes({text!r}));
        if (found.length !== 1) throw new Error(`${{found.length}} elements {selector} {text}`);
        found[0].click();
    }}""")


def shown(page: Page, what: str) -> list[str]:
    texts: list[str] = page.js(f"[...document.querySelectorAll({what!r})].map((node) => node.innerText)")
    return texts


def store(page: Page, expression: str) -> Any:
    return page.js(f"import('/static/store.js').then(async (store) => {expression})")


# ---- answers ----


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
    page.js("window.sent = []; window.realFetch = window.fetch")
    page.js(
        "window.fetch = (path, options) => { window.sent.push(options?.body); return window.realFetch(path, options); }"
    )
    ask(page, "And alpacas?")
    page.wait(SETTLED.format(n=2))
    sent = json.loads(page.js("window.sent.find(Boolean)"))
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert (sent["temperature"], sent["top_p"]) == (0, 0.9)
    before = shown(page, ".answer")
    load(page, f"{server.url}/")
    assert shown(page, ".answer") == before
    click(page, "#open-settings")
    assert page.js("document.getElementById('system').value") == "Be brief."
    click(page, "#settings .close")
    page.press("n", "KeyN", alt=True)
    assert shown(page, ".answer") == []
    assert len(shown(page, "#chats li")) == 2


def test_escape_stops_an_answer_and_keeps_what_has_come(page: Page, server: ServerProcesses) -> None:
    page.js(FED)
    ask(page, "Where do llamas live?")
    page.wait("window.streams.length")
    page.js("window.feed('so far')")
    page.wait("document.querySelector('.answer').innerText.trim() === 'so far'")
    assert shown(page, "#send") == ["Stop"]
    page.press("Escape")
    page.wait(SETTLED.format(n=1))
    assert [text.strip() for text in shown(page, ".answer")] == ["so far"]
    assert shown(page, ".error") == []
    assert shown(page, "#send") == ["Send"]
    server.wait_until_idle()


def test_errors_of_the_server_show_and_their_turns_are_not_sent_again(page: Page) -> None:
    ask(page, "A tag: [INST]")
    page.wait(SETTLED.format(n=1))
    (error,) = shown(page, ".error")
    assert error.startswith("messages[0].content")
    ask(page, "<img src=x onerror='window.broken = 1'>")
    page.wait(SETTLED.format(n=2))
    assert len(shown(page, ".error")) == 1
    assert page.js("window.broken") is None


def test_a_full_context_goes_on_without_the_older_turns(page: Page) -> None:
    for i in range(3):
        ask(page, f"{i} " + "llama " * 60)
        page.wait(SETTLED.format(n=i + 1))
        if shown(page, ".error") or "cut at the limit" in shown(page, ".count")[-1]:
            break
    assert i > 0
    click(page, ".meta button", "Continue without the older turns")
    page.wait(f"{SETTLED.format(n=i + 1)} && document.querySelector('.divider')")
    assert shown(page, ".error") == []
    assert shown(page, ".answer")[-1]
    assert len(shown(page, ".divider")) == 1


def test_the_key_is_asked_for_where_it_is_missing(page: Page) -> None:
    page.js("""
        window.realFetch = window.fetch;
        window.fetch = async (path, options) => {
            const isOpen = !path.startsWith("v1/") || options.headers.Authorization === "Bearer sesame";
            if (isOpen) return window.realFetch(path, options);
            return new Response('{ "error": { "message": "the API key is wrong" } }', { status: 401 });
        };
    """)
    ask(page, "Where do llamas live?")
    page.wait("document.getElementById('key-dialog').open")
    page.type("sesame")
    page.press("Enter")
    page.wait(f"{SETTLED.format(n=1)} && document.querySelector('.answer').innerText.trim()")
    assert shown(page, ".error") == []
    assert not page.js("document.getElementById('key-dialog').open")


# ---- Markdown ----


def test_markdown_becomes_elements_and_code_has_a_label_and_colors(page: Page) -> None:
    ask_and_feed(page, "Tell me.", MARKDOWN)
    found = page.js("document.querySelector('.answer').innerHTML")
    for text in ("<h1>Llamas</h1>", "<strong>bold</strong>", "<em>slanted</em>", "<code>inline</code>", "<ol>", "<ul>"):
        assert text in found
    assert page.js("document.querySelector('.answer td:last-child').getAttribute('align')") == "right"
    link = "document.querySelector('.answer a')"
    assert page.js(f"[{link}.href, {link}.target, {link}.rel]") == [
        "https://example.org/llama", "_blank", "noopener noreferrer",
    ]  # fmt: skip
    assert shown(page, ".code .language") == ["python"]
    assert "hljs-keyword" in found and "hljs-comment" in found
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    click(page, ".code button")
    page.wait("window.copied")
    assert page.js("window.copied").startswith('def greet(name):\n    return f"hello')


def test_what_a_model_writes_is_never_html(page: Page) -> None:
    page.js("document.addEventListener('securitypolicyviolation', (event) => { window.violated = event.blockedURI; })")
    ask_and_feed(page, "Tell me.", *(HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)))  # halves of tags, too
    inside = "document.querySelector('.answer').querySelectorAll"
    assert page.js(f"{inside}('img, script, b, svg, style, iframe').length") == 0
    names = page.js(f"[...{inside}('*')].flatMap((node) => node.getAttributeNames())")
    assert not [name for name in names if re.match("on|style|src", name)]
    hrefs = page.js(f"[...{inside}('a')].map((node) => node.getAttribute('href'))")
    assert all(href is None or href.startswith("https://example.org/") for href in hrefs)
    assert "<b>bold</b>" in shown(page, ".answer")[0]
    assert shown(page, ".code code")[0].strip() == "<script>window.broken = 1</script>"
    assert page.js("[window.broken, window.violated]") == [None, None]


def test_the_page_comes_from_the_server_alone(server: ServerProcesses) -> None:
    page = httpx.get(f"{server.url}/")
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    names = {str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.suffix in (".js", ".css")}
    used = set(re.findall(r'(?:src|href)="static/([^"]*)"', page.text))
    assert used <= names and not re.search(r'(?:src|href)="(?!static/|#|data:)', page.text)
    for name in names:
        answer = httpx.get(f"{server.url}/static/{name}")
        assert answer.content == (STATIC / name).read_bytes()
        assert answer.headers["Content-Security-Policy"] == policy
        again = httpx.get(f"{server.url}/static/{name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{server.url}/static/../app.py").status_code == 404


def test_the_libraries_of_the_page_have_their_licence_and_version() -> None:
    vendor = STATIC / "vendor"
    rows = re.findall(r"^\| `(.*?)` \| (\S+) (\S+), .*`(LICENSE\..*?)` \|$", (vendor / "README.md").read_text(), re.M)
    assert {name for name, *_ in rows} == {path.name for path in vendor.glob("*.js")}
    for name, package, version, licence in rows:
        assert version in (vendor / name).read_text(encoding="utf-8")[:500], f"{package} is not of version {version}"
        assert (vendor / licence).stat().st_size > 500


# ---- history ----


def test_a_reload_in_the_middle_of_an_answer_keeps_question_and_answer(page: Page, server: ServerProcesses) -> None:
    page.js(FED)
    ask(page, "Where do llamas live?")
    page.wait("window.streams.length")
    page.js("window.feed('In the')")
    page.wait("document.querySelector('.answer').innerText.includes('In the')")
    page.js("""new Promise(async (done) => {
        const store = await import("/static/store.js");
        while ((await store.get(location.hash.slice(1)))?.turns[0].answer !== "In the") await null;
        done();
    })""")
    load(page, f"{server.url}/")
    page.wait(SETTLED.format(n=1))
    assert shown(page, ".user") == ["Where do llamas live?"]
    assert shown(page, ".answer")[0].strip() == "In the"
    assert "interrupted" in shown(page, ".count")[0]
    click(page, ".meta button", "Regenerate")
    page.wait(f"{SETTLED.format(n=1)} && document.querySelector('.count').textContent.includes('tokens')")


def test_two_tabs_keep_both_their_chats_and_see_each_other(page: Page, server: ServerProcesses) -> None:
    page.js("window.other = window.open('/'); null")
    other = "window.other.document"
    page.wait(f"{other}.title === 'tiny-llama'")
    page.js(FED)
    ask(page, "From the first tab")
    page.wait("window.streams.length")
    page.js(f"{other}.getElementById('input').value = 'From the second tab'")
    page.js(f"{other}.getElementById('form').onsubmit(new Event('submit'))")
    page.wait(f"{other}.querySelector('.count')?.textContent")
    page.js("window.feed('Still answering')")
    titles = "[...{0}.querySelectorAll('#chats .open')].map((node) => node.title).sort().join()"
    both = "From the first tab,From the second tab"
    page.wait(f"{titles.format('document')} === '{both}' && {titles.format(other)} === '{both}'")
    page.js(f"[...{other}.querySelectorAll('#chats .open')].find((node) => node.title.includes('first')).click()")
    page.wait(f"{other}.querySelector('.answer')?.innerText.includes('Still answering')")
    assert page.js(f"{other}.getElementById('send').textContent") == "Stop"
    page.js(f"{other}.getElementById('form').onsubmit(new Event('submit'))")  # stops the first tab's
    page.wait(SETTLED.format(n=1))
    page.js("window.other.close()")
    load(page, f"{server.url}/")
    assert len(shown(page, "#chats li")) == 2


def test_an_answer_whose_tab_is_closed_is_interrupted_in_the_other_tab(page: Page) -> None:
    page.js("window.other = window.open('/'); null")
    other = "window.other.document"
    page.wait(f"{other}.title === 'tiny-llama'")
    page.js("window.other.fetch = async () => new window.other.Response(new window.other.ReadableStream({}))")
    page.js(f"{other}.getElementById('input').value = 'To be closed'")
    page.js(f"{other}.getElementById('form').onsubmit(new Event('submit'))")
    page.wait("document.querySelector('#chats .dot')")
    click(page, "#chats .open", "To be closed")
    page.wait("document.querySelector('.answer.busy')")
    page.js("window.other.close()")
    page.wait(f"{SETTLED.format(n=1)} && document.querySelector('.count').textContent.includes('interrupted')")
    assert shown(page, "#send") == ["Send"]


def test_another_chat_can_be_opened_while_one_answers(page: Page) -> None:
    page.js(FED)
    ask(page, "The slow one")
    page.wait("window.streams.length === 1")
    page.js("window.feed('slow ')")
    click(page, "#new")
    ask(page, "The quick one")
    page.wait("window.streams.length === 2")
    page.js("window.feed('quick'); window.end(); window.feed('answer', window.streams[0])")
    page.wait(SETTLED.format(n=1))
    assert [text.strip() for text in shown(page, ".answer")] == ["quick"]
    assert len(shown(page, "#chats .dot")) == 1
    click(page, "#chats .open", "The slow one")
    page.wait("document.querySelector('.answer').innerText.trim() === 'slow answer'")
    assert shown(page, "#send") == ["Stop"]
    page.js("window.end(window.streams[0])")
    page.wait(SETTLED.format(n=1))
    assert shown(page, "#chats .dot") == []


def test_a_question_is_edited_and_asked_again_and_that_is_undone(page: Page) -> None:
    for i, question in enumerate(("Who are you?", "What is Llama 2?")):
        ask(page, question)
        page.wait(SETTLED.format(n=i + 1))
    before = shown(page, ".user, .answer")
    page.js("document.querySelector('.question button').click()")
    page.js("document.activeElement.select()")
    page.type("How do I make mayonnaise?")
    page.press("Enter")
    page.wait(f"{SETTLED.format(n=1)} && document.querySelector('.count').textContent")
    assert shown(page, ".user") == ["How do I make mayonnaise?"]
    assert "egg" in shown(page, ".answer")[0]
    click(page, "#undo")
    page.wait(SETTLED.format(n=2))
    assert shown(page, ".user, .answer") == before


def test_chats_are_renamed_searched_deleted_and_brought_back(page: Page, server: ServerProcesses) -> None:
    for question in ("Where do llamas live?", "How do I make mayonnaise?"):
        ask(page, question)
        page.wait(SETTLED.format(n=1))
        click(page, "#new")
    page.js("document.querySelectorAll('#chats [title=Rename]')[2].click()")
    page.type("Animals")
    page.press("Enter")
    assert shown(page, "#chats .open") == ["New chat", "How do I make mayonnaise?", "Animals"]
    page.js("document.getElementById('search').value = 'EGG'; document.getElementById('search').oninput()")
    assert shown(page, "#chats .open") == ["How do I make mayonnaise?"], "by the text of its answer"
    click(page, "#chats [title=Delete]")
    page.wait("!document.getElementById('toast').hidden")
    assert shown(page, "#chats .open") == []
    click(page, "#undo")
    page.wait("document.querySelectorAll('#chats .open').length === 1 && document.querySelector('.answer')")
    click(page, "#chats [title=Delete]")
    page.wait("!document.getElementById('toast').hidden")
    load(page, f"{server.url}/")
    assert shown(page, "#chats .open") == ["Animals"]


def test_chats_are_exported_and_imported(page: Page, server: ServerProcesses, tmp_path: Path) -> None:
    ask_and_feed(page, "What is kept?", "Everything")
    page.js("URL.createObjectURL = (blob) => { window.exported = blob.text(); return 'data:,'; }")
    click(page, "#export")
    exported = page.js("window.exported")
    assert json.loads(exported)["chats"][0]["turns"][0]["answer"] == "Everything"
    click(page, "#chats [title=Delete]")
    page.wait("!document.getElementById('toast').hidden")
    for text, result in ((exported, "1 chats imported"), ('{"chats": [{}]}', "no id"), ("[", "no chats of this page")):
        page.js(f"""{{
            const files = new DataTransfer(), input = document.getElementById("import-file");
            files.items.add(new File([{json.dumps(text)}], "chats.json"));
            input.files = files.files;
            input.onchange();
        }}""")
        page.wait(f"document.getElementById('import-result').textContent.includes({json.dumps(result)})")
    load(page, f"{server.url}/")
    assert shown(page, "#chats .open") == ["What is kept?"]
    assert shown(page, ".answer")[0].strip() == "Everything"


def test_versions_of_a_chat_are_merged(page: Page) -> None:
    def chat(changed: int, turns: dict[str, int], **fields: Any) -> dict[str, Any]:
        listed = [{"id": name, "created": ord(name), "changed": at} for name, at in turns.items()]
        return {"id": "x", "changed": changed, "turns": listed, "removed": []} | fields

    def merged(a: Any, b: Any) -> Any:
        return store(page, f"store.merge({json.dumps(a)}, {json.dumps(b)})")

    one, two = chat(2, {"a": 1, "b": 5}, title="new"), chat(1, {"a": 3, "c": 1}, title="old", removed=["d"])
    for both in (merged(one, two), merged(two, one)):
        assert both["title"] == "new"
        assert [(turn["id"], turn["changed"]) for turn in both["turns"]] == [("a", 3), ("b", 5), ("c", 1)]
    again = merged(merged(one, two), chat(0, {"d": 9}))
    assert [turn["id"] for turn in again["turns"]] == ["a", "b", "c"], "what was removed stays so"


# ---- looks ----


def test_it_fits_a_phone_with_labels_and_large_targets_in_both_themes(page: Page) -> None:
    ask_and_feed(page, "x" * 200, "`" + "y" * 200 + "`" + MARKDOWN)
    page.size(360, 700, mobile=True)
    small = """[...document.querySelectorAll("button, input, textarea, select, a")].filter((node) => {
        const box = node.getBoundingClientRect(), isText = node.tagName === "A";
        const name = node.ariaLabel || node.innerText || node.labels?.[0]?.innerText;
        if (!node.checkVisibility({ visibilityProperty: true })) return false;
        return !name || (!isText && Math.min(box.width, box.height) < 43.9);
    }).map((node) => node.outerHTML + JSON.stringify(node.getBoundingClientRect()))"""
    states = {
        "a chat": "",
        "the list": "document.getElementById('menu').click()",
        "renaming": "document.querySelector('#chats [title=Rename]').click()",
        "settings": "document.getElementById('open-settings').click()",
    }
    for state, change in states.items():
        page.js(change)
        page.wait("document.getAnimations().every((one) => one.effect.getTiming().iterations > 9)")
        assert page.js(small) == [], state
        assert page.js("document.documentElement.scrollWidth") <= 360, state
    colors = []
    for theme in ("dark", "light"):
        page.js(f"document.getElementById('theme').value = {theme!r}; document.getElementById('theme').onchange()")
        colors.append(page.js("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colors)) == 2

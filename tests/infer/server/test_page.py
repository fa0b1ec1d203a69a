"""The chat page: self-contained, with a strict policy, and as a browser's user has it."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from llmlab.infer.engine.request import Event, Handle
from llmlab.infer.server.page import chat_page
from tests.infer.server.browser import CHROMIUM, Browser
from tests.infer.server.fake import FakeEngine, letters
from tests.infer.server.serving import client_of, fake_client, running, service_of, until
from tests.infer.server.test_completions import ids_of

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
WATCH = """
window.seen = new Set();
new MutationObserver(() => seen.add(document.querySelector('.turn.assistant .text')?.textContent.length))
  .observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true});
"""
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'


def test_the_page_needs_nothing_but_its_own_server_and_says_so() -> None:
    client, _ = fake_client()
    response = client.get("/")
    page, policy = chat_page()
    assert response.text == page == files("llmlab.infer.server").joinpath("page.html").read_text(encoding="utf-8")
    assert response.headers["content-security-policy"] == policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-frame-options"] == "DENY"
    assert not re.search(r"https?:|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\son\w+=|\sstyle=", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]


def test_every_field_of_the_page_has_a_name() -> None:
    page, _ = chat_page()
    fields = re.findall(r"<(?:input|select|textarea) [^>]*id=\"([\w-]+)\"", page)
    assert fields
    for field in fields:
        inside = re.search(rf"<label[^>]*>(?:(?!</label>).)*id=\"{field}\"", page, re.DOTALL)
        assert inside or f'for="{field}"' in page, field


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.look(width=1000, height=700)
        yield browser


def fresh(browser: Browser, url: str) -> None:
    browser.said.clear()
    browser.requested.clear()
    browser.open(url)


ANSWERED = "document.querySelectorAll('.turn.assistant .note').length"


@in_browser
def test_a_question_is_answered_piece_by_piece_and_the_conversation_goes_on(browser: Browser) -> None:
    engine = FakeEngine(seconds=0.01, max_length=400)
    with running(service_of(engine, template=TEMPLATE)) as (url, _, _):
        fresh(browser, url)
        browser.wait("document.title === 'tiny · llmlab'")
        browser.value("document.getElementById('max-tokens').value = '30'")
        assert browser.value("document.activeElement.id") == "input"
        browser.value(WATCH)
        browser.type("hello")
        browser.press("Enter", 13)
        browser.wait(f"{ANSWERED} === 1")
        first = letters(b"u:hello;", 0, 30)
        assert browser.value("document.querySelector('.turn.assistant .text').textContent") == first
        assert browser.value("seen.size") > 5  # it grew
        browser.type("two\nlines")
        browser.press("Enter", 13)
        browser.wait(f"{ANSWERED} === 2")
        expected = f"u:hello;a:{first};u:two\nlines;".encode()
        assert bytes(engine.requests[1].prompt_ids) == expected
        assert browser.value("document.activeElement.id") == "input"
        assert browser.said == []
        paths = {address.removeprefix(url) for address in browser.requested}
        assert paths - {"data:,"} == {"/", "/v1/models", "/v1/chat/completions"}
        assert "30 tokens" in browser.value("document.querySelector('.turn.assistant .note').textContent")


@in_browser
def test_what_users_and_models_write_is_shown_as_text(browser: Browser) -> None:
    class Hostile(FakeEngine):
        def _write_sample(self, handle: Handle, sample: int) -> None:
            handle.put(Event(sample, (1,), HOSTILE, None, "stop"))

    with running(service_of(Hostile(max_length=400), template=TEMPLATE)) as (url, _, _):
        fresh(browser, url)
        browser.wait("document.title === 'tiny · llmlab'")
        browser.type(HOSTILE)
        browser.press("Enter", 13)
        browser.wait(f"{ANSWERED} === 1")
        texts = browser.value("[...document.querySelectorAll('.turn .text')].map(node => node.textContent)")
        assert texts == [HOSTILE, HOSTILE]
        assert browser.value("window.hit === undefined && document.images.length === 0")
        assert browser.said == []


@in_browser
def test_the_stop_button_and_escape_end_an_answer_at_the_engine(browser: Browser) -> None:
    engine = FakeEngine(seconds=0.03, max_length=400)
    with running(service_of(engine, template=TEMPLATE)) as (url, _, _):
        fresh(browser, url)
        browser.wait("document.title === 'tiny · llmlab'")
        for number, end in enumerate(("document.getElementById('stop').click()", None), start=1):
            browser.type("hello")
            browser.press("Enter", 13)
            browser.wait("document.querySelector('.turn.writing .text')?.textContent.length > 3")
            browser.value(end) if end else browser.press("Escape", 27)
            browser.wait(f"{ANSWERED} === {number}")
            assert browser.value("document.getElementById('stop').hidden")
            assert "stopped" in browser.value("[...document.querySelectorAll('.note')].at(-1).textContent")
        until(lambda: len(engine.cancelled) == 2)
        assert browser.said == []


@in_browser
def test_failures_are_shown_and_can_be_tried_again(browser: Browser) -> None:
    engine = FakeEngine(max_length=400)
    with running(service_of(engine, template=TEMPLATE)) as (url, _, _):
        fresh(browser, url)
        browser.wait("document.title === 'tiny · llmlab'")
        engine.fails = "the device is lost"
        browser.type("hello")
        browser.press("Enter", 13)
        browser.wait("!document.getElementById('error').hidden")
        assert "the device is lost" in browser.value("document.getElementById('error-text').textContent")
        engine.fails = ""
        browser.value("document.getElementById('retry').click()")
        browser.wait(f"{ANSWERED} === 1")
        assert browser.value("document.getElementById('error').hidden")
        assert bytes(engine.requests[1].prompt_ids) == b"u:hello;"
        browser.value("document.getElementById('max-tokens').value = '100000'")
        browser.type("more")
        browser.press("Enter", 13)
        browser.wait("!document.getElementById('error').hidden")
        assert "positions" in browser.value("document.getElementById('error-text').textContent")


@in_browser
def test_a_key_is_asked_for_and_a_model_without_template_continues_texts(browser: Browser) -> None:
    engine = FakeEngine()
    with running(service_of(engine, api_key="secret")) as (url, _, _):
        fresh(browser, url)
        browser.wait("document.activeElement.id === 'key'")
        assert "API key" in browser.value("document.getElementById('error-text').textContent")
        browser.type("secret")
        browser.press("Tab", 9)
        browser.wait("document.title === 'tiny · llmlab'")
        assert browser.value("document.getElementById('mode').value") == "text"
        browser.value("document.getElementById('max-tokens').value = '10'; document.getElementById('input').focus()")
        browser.type("Once")
        browser.press("Enter", 13)
        browser.wait("document.querySelectorAll('.turn.plain .note').length === 1")
        written = "Once" + letters(ids_of("Once"), 0, 10)
        assert browser.value("document.querySelector('.turn.plain .text').textContent") == written
        assert browser.value("document.cookie + Object.keys(localStorage) + Object.keys(sessionStorage)") == ""


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 360])
def test_it_fits_the_window_in_both_themes(browser: Browser, width: int, dark: bool, tmp_path: Path) -> None:
    engine = FakeEngine(max_length=2000)
    with running(service_of(engine, template=TEMPLATE)) as (url, _, _):
        browser.look(width=width, height=700, dark=dark)
        fresh(browser, url)
        browser.wait("document.title === 'tiny · llmlab'")
        browser.value("document.getElementById('settings-button').click()")
        browser.type("a long word: " + "w" * 300)
        browser.press("Enter", 13)
        browser.wait(f"{ANSWERED} === 1")
        assert browser.value("document.documentElement.scrollWidth") == width
        box = browser.value("JSON.stringify(document.getElementById('input').getBoundingClientRect())")
        assert '"height":0' not in box
        assert browser.value("document.getElementById('input').getBoundingClientRect().bottom") <= 700
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 21, 24)" if dark else "rgb(252, 252, 250)")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 5000
        assert browser.said == []


def test_the_page_s_service_is_told_what_kind_of_template_there_is() -> None:
    for template, kind in ((TEMPLATE, "model"), (None, "plain")):
        client = client_of(service_of(FakeEngine(), template=template))
        assert client.get("/v1/models").json()["data"][0]["chat_template"] == kind

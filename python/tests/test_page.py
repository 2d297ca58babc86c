"""The chat page of the server, in Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browsing, chromium
from conftest import DEMO
from serving import serving

LAST = "[...document.querySelectorAll('.assistant')].at(-1)"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    chromium()
    with browsing(tmp_path / "profile") as page:
        yield page


def ask(page: Page, question: str) -> None:
    page.evaluate(f"document.getElementById('prompt').value = {question!r}")
    page.evaluate("document.getElementById('send').click()")


def shoot(page: Page, name: str) -> None:
    """Pictures for people, where they ask for them."""
    if folder := os.environ.get("QWEN2_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def test_a_question_is_answered_as_it_streams(page: Page) -> None:
    with serving(DEMO) as server:
        page.open(server.url + "/")
        page.wait_for("document.querySelectorAll('#empty button').length")
        shoot(page, "empty")
        page.evaluate("document.querySelector('[name=temperature]').value = '0'")
        ask(page, "What is 12 plus 30?")
        page.wait_for(LAST + "?.dataset.done")
        assert page.evaluate(LAST + ".querySelector('.text').innerText") == "12 + 30 = 42."
        assert "tokens/s" in page.evaluate(LAST + ".querySelector('.meta').innerText")
        # The conversation goes on: the next request brings the first question and its answer.
        ask(page, "Count from 5 to 15.")
        page.wait_for("document.querySelectorAll('[data-done]').length === 2")
        assert "13" in page.evaluate(LAST + ".querySelector('.text').innerText")
        roles = page.evaluate("messages.map((message) => message.role)")
        assert roles == ["user", "assistant", "user", "assistant"]
        shoot(page, "light")
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.call("Emulation.setEmulatedMedia", features=dark)
        page.evaluate("openSettings(true)")
        shoot(page, "dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 19, 24)"
        asked = [url for url in page.requested if not url.startswith(("data:", server.url))]
        assert asked == [], "nothing comes from elsewhere"
        assert page.complaints == []


def test_stop_ends_the_answer_and_keeps_what_there_is(page: Page, long_directory: Path) -> None:
    with serving(long_directory) as server:
        page.open(server.url + "/")
        page.wait_for("document.querySelectorAll('#empty button').length")
        # An answer without an end, through the page's own request.
        page.evaluate("{ const plain = request; request = () => ({ ...plain(), ignore_eos: true }); }")
        ask(page, "Count from 5 to 15.")
        page.wait_for(LAST + "?.querySelector('.text').innerText.length > 20")
        assert page.evaluate("!document.getElementById('stop').hidden")
        shoot(page, "running")
        page.evaluate("document.getElementById('stop').click()")
        page.wait_for(LAST + ".dataset.done")
        assert page.evaluate(LAST + ".querySelector('.meta').innerText").endswith(", stopped")
        assert page.evaluate("document.getElementById('stop').hidden")
        page.wait_for("fetch('metrics').then((r) => r.text()).then((t) => /qwen2_answers_running 0/.test(t))")


def test_an_error_is_shown_and_the_key_asked_for(page: Page) -> None:
    with serving(DEMO, "--api-key", "secret") as server:
        page.open(server.url + "/")
        page.wait_for("document.getElementById('empty').innerText.includes('API key')")
        assert page.evaluate("!document.getElementById('settings').hidden")
        page.evaluate("document.querySelector('[name=api_key]').value = 'secret'")
        page.evaluate("document.querySelector('[name=api_key]').dispatchEvent(new Event('change'))")
        page.wait_for("document.getElementById('model').innerText.startsWith('demo-model')")
        page.evaluate("document.querySelector('[name=temperature]').value = '1000'")
        ask(page, "What is 12 plus 30?")
        page.wait_for(LAST + "?.dataset.done")
        assert "temperature" in page.evaluate("document.querySelector('.error').innerText")
        assert page.evaluate("messages.length") == 0, "the question can be asked again"

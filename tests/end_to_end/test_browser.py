"""The pages in a real browser: the report from disk, and labelling and chatting by clicks and keys.
Needs Chromium or Chrome, and no network."""

import re
import shutil
import sys

import hand_made
import pytest
from playwright.sync_api import expect, sync_playwright

from goose_lora.apps import chat_page, gradio_pages, label_page
from goose_lora.apps.label import LabelQueue
from goose_lora.apps.label_file import ChoiceFile
from goose_lora.apps.session import PolicySession, SampledReply, inspect_run
from goose_lora.files import read_jsonl
from goose_lora.reporting import html_report

BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
NASTY = "<b>not bold</b> ${7 * 7} {{value}} <img src=http://example.org/x.png>"
LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser():
    found = next((place for name in BROWSERS if (place := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no browser: looked for {', '.join(BROWSERS)} on PATH")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


class Watched:
    """A new window: its tabs, what they asked the network for, and what was wrong."""

    def __init__(self, browser):
        self.context = browser.new_context(viewport={"width": 1200, "height": 800})
        self.requests, self.wrong = [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on(
            "console", lambda message: self.wrong.append(message.text) if message.type == "error" else None
        )
        self.context.on("weberror", lambda error: self.wrong.append(str(error.error)))

    def tab(self, url):
        tab = self.context.new_page()
        tab.goto(url)
        return tab


@pytest.fixture
def window(browser):
    watched = Watched(browser)
    yield watched
    watched.context.close()
    assert watched.wrong == []


# The report


def test_the_report_opens_from_disk_shows_its_pictures_and_asks_for_nothing_else(window, tmp_path):
    folder = hand_made.write(
        tmp_path / "a-run", lines=hand_made.samples(text=NASTY), evaluation=hand_made.EVALUATION
    )
    html_report.write_report(folder)
    address = (folder / "report.html").as_uri()
    tab = window.tab(address)
    widths = tab.evaluate("Array.from(document.images, image => image.complete && image.naturalWidth)")
    assert len(widths) == 2 and all(width > 400 for width in widths)
    assert [url for url in window.requests if not url.startswith("data:")] == [address]
    assert tab.title() == "a-run" and tab.get_by_text(f"{NASTY} at 0").count() == 2
    wider = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider == 0, "nothing sticks out at the side"


# Labelling


def reply(text):
    return SampledReply(text, 3, True, None)


@pytest.fixture
def labelling(tmp_path):
    """A page that asks about five prompts, and the file that it writes to."""
    file = tmp_path / "pairs.jsonl"
    queue = LabelQueue(
        [f"prompt {number} {NASTY}" for number in range(5)],
        lambda number: (reply(f" left {number} {NASTY}"), reply(f" right {number}")),
        ChoiceFile(file),
        policy="p1",
    )
    blocks = label_page.build_label_page(queue, title="Labelling a run")
    yield gradio_pages.open_page(blocks, port=None, css=label_page.LABEL_CSS, head=label_page.KEYS), file
    blocks.close(verbose=False)


def number_shown(tab):
    """The number of the prompt that the page asks about."""
    expect(tab.locator("#prompt")).to_contain_text("prompt")
    return re.search(r"prompt (\d)", tab.locator("#prompt").inner_text())[1]


def choose(tab, act):
    """Do it, and wait for the next pair."""
    before = tab.locator("#key textarea").input_value()
    act()
    expect(tab.locator("#key textarea")).not_to_have_value(before)
    return tab.locator("#said").inner_text().strip()


def test_clicks_and_keys_write_the_lines_that_they_stand_for(window, labelling):
    url, file = labelling
    tab = window.tab(url)
    shown = []
    for act, says in (
        (lambda: tab.click("#right"), "Kept: 2 is better."),
        (lambda: tab.keyboard.press("1"), "Kept: 1 is better."),
        (lambda: tab.keyboard.press("ArrowRight"), "Kept: 2 is better."),
        (lambda: tab.keyboard.press("0"), "Kept: no difference."),
        (lambda: tab.keyboard.press("s"), "Skipped."),
    ):
        shown.append(number_shown(tab))
        assert choose(tab, act) == says
    expect(tab.locator("#progress")).to_contain_text("5 of 5 prompts: 3 as pairs, 2 ties or skipped")
    expect(tab.locator("#left")).to_be_hidden()
    rows = read_jsonl(file)
    assert sorted(shown) == list("01234")
    assert [row["prompt"] for row in rows] == [f"prompt {number} {NASTY}" for number in shown[:3]]
    assert [row["chosen"].split()[0] for row in rows] == ["right", "left", "right"]
    assert rows[1]["chosen"] == f" left {shown[1]} {NASTY}" and rows[1]["rejected"] == f" right {shown[1]}"
    passed = read_jsonl(file.with_suffix(".passed.jsonl"))
    assert [(row["prompt"][7], row["choice"]) for row in passed] == [(shown[3], "tie"), (shown[4], "skip")]
    assert {
        url.split("/")[2].split(":")[0] for url in window.requests if not url.startswith(("data:", "blob:"))
    } == {"127.0.0.1"}


def test_what_people_and_models_wrote_is_shown_letter_by_letter(window, labelling):
    tab = window.tab(labelling[0])
    number = number_shown(tab)
    assert tab.locator("#prompt").inner_text().strip() == f"prompt {number} {NASTY}"
    assert tab.locator("#replies .card").all_inner_texts() == [f"left {number} {NASTY}", f"right {number}"]
    assert tab.locator("#replies b, #replies img").count() == 0


def test_a_reload_shows_the_same_pair_and_a_second_tab_another(window, labelling):
    url, file = labelling
    tab = window.tab(url)
    number = number_shown(tab)
    tab.reload()
    assert number_shown(tab) == number
    other = window.tab(url)
    second = number_shown(other)
    assert second != number
    choose(other, lambda: other.keyboard.press("2"))
    tab.reload()
    assert number_shown(tab) == number
    choose(tab, lambda: tab.keyboard.press("1"))
    assert [row["prompt"][7] for row in read_jsonl(file)] == [second, number]
    assert len({number, second, number_shown(tab), number_shown(other)}) == 4


def test_a_reply_that_is_edited_is_kept_and_keys_pressed_in_it_choose_nothing(window, labelling):
    url, file = labelling
    tab = window.tab(url)
    number = number_shown(tab)
    tab.click("#right-edit button")
    tab.locator("#right-better textarea").press_sequentially(" and 1 2 0 s too")
    assert choose(tab, lambda: tab.click("#right-save")) == "Kept: your text is better."
    (row,) = read_jsonl(file)
    assert (row["chosen"], row["rejected"], row["edited"]) == (
        f" right {number} and 1 2 0 s too",
        f" right {number}",
        True,
    )
    number = number_shown(tab)
    expect(tab.locator("#right-better textarea")).to_be_hidden()
    tab.click("#left-edit button")
    tab.click("#left-save")
    expect(tab.get_by_text("the edited reply is the same as before")).to_be_visible()
    assert number_shown(tab) == number and len(read_jsonl(file)) == 1


# Chatting


@pytest.fixture(scope="module")
def chatting(adapter_chain):
    session = PolicySession(inspect_run(adapter_chain / "ppo"), max_new_tokens=6)
    blocks = chat_page.build_chat_page(session, ["base", "sft", "ppo"], seed=0)
    yield gradio_pages.open_page(blocks, port=None, css=chat_page.CHAT_CSS), session
    blocks.close(verbose=False)


def test_the_chat_page_answers_with_the_replies_of_each_role_and_clears(window, chatting):
    url, session = chatting
    tab = window.tab(url)
    for count, (line, act) in enumerate(
        (("ba be", lambda: tab.keyboard.press("Enter")), ("bi", lambda: tab.click("#send")))
    ):
        tab.locator("#line textarea").fill(line)
        act()
        latest = tab.locator(".exchange").first
        for name in ("base", "sft", "ppo"):
            (want,) = session.reply(name, line, seed=count)
            expect(latest.locator(f".{name}")).to_contain_text(want.facts())
            assert latest.locator(f".{name} .words").text_content() == line + want.text
    other = window.tab(url)
    expect(other.locator("#line textarea")).to_be_visible()
    assert tab.locator(".exchange").count() == 2 and other.locator(".exchange").count() == 0, (
        "each tab has its own"
    )
    tab.click("#anew")
    expect(tab.locator(".exchange")).to_have_count(0)
    assert {
        url.split("/")[2].split(":")[0] for url in window.requests if not url.startswith(("data:", "blob:"))
    } == {"127.0.0.1"}


def test_serving_a_page_connects_to_no_other_machine_and_needs_no_proxy(labelling, window, monkeypatch):
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("NO_PROXY", ""), ("no_proxy", "")):
        monkeypatch.setenv(name, value)
    asked = []
    sys.addaudithook(
        lambda event, args: asked.append(args) if event in ("socket.connect", "socket.getaddrinfo") else None
    )
    blocks = label_page.build_label_page(
        LabelQueue(["x"], lambda number: None, ChoiceFile(labelling[1]), policy="p"), title="t"
    )
    address = gradio_pages.open_page(blocks, port=None)
    expect(window.tab(address).locator("#progress")).to_contain_text("1 without two different replies")
    blocks.close(verbose=False)
    places = {args[1][0] if isinstance(args[1], tuple) else args[0] for args in asked}
    assert asked and places <= set(LOOPBACK)

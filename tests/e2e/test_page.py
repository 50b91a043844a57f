"""The page in a real browser before a real server over a tiny model with random weights.

Nothing is mocked: what a test expects of an answer is what the API says to the same conversation told from its
beginning.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browsing import (
    SETTINGS,
    Visitor,
    add_text,
    afresh,
    ask,
    chromium,
    expect,
    kept,
    messages,
    press,
    rest,
    send,
    states,
    told,
    writer,
)
from tests.e2e.serving import Served, serving, settled, slowly


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), decoder=writer()) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any) -> Iterator[Visitor]:
    visitor = Visitor(browser)
    yield visitor
    visitor.leave()


# ---- chat


def test_a_chat_and_what_it_costs(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#message")).to_be_focused()
    page.locator("#message").type("One line")
    page.locator("#message").press("Shift+Enter")
    page.locator("#message").type("and <b>another</b>")
    with slowly(0.02):
        page.locator("#message").press("Enter")
        expect(page.locator("li.assistant .text")).not_to_be_empty()
        expect(page.locator("#stop")).to_be_visible()  # it is shown while it is written
        expect(page.locator("li.assistant")).to_have_attribute("aria-busy", "true")
        expect(page.locator("#announcer")).to_be_empty()  # and not read out before it is whole
        rest(page)
    expect(page.locator("#message")).to_be_empty()
    ask(page, "Two")
    talk = messages(page)
    assert [one["content"] for one in talk[::2]] == ["One line\nand <b>another</b>", "Two"]
    for count in (1, 3):
        assert talk[count]["content"] == afresh(served, talk[:count])
    assert [text for _, text in told(page)] == [one["content"].rstrip() for one in talk]
    expect(page.locator("#announcer")).to_contain_text(talk[3]["content"].strip())
    expect(page.locator("h1")).to_have_text("One line and <b>another</b>")

    last = kept(page)[-1]["state"]
    assert last in [{key: state[key] for key in last} for state in states(served)]
    expect(page.locator("#tokens")).to_have_text(str(last["tokens"]))
    expect(page.locator("#memory")).to_have_text(re.compile(r"^[\d.]+ kB$"))
    assert float(page.locator("#memory").text_content().split()[0]) == pytest.approx(last["bytes"] / 1000, rel=0.01)
    expect(page.locator("#pace")).to_have_text(re.compile(r"^[\d.]+ ms$"))
    words = page.locator("#memory-plot").get_attribute("aria-label")
    sizes = re.fullmatch(r"Memory: ([\d.]+) kB at \d+ tokens, ([\d.]+) kB at \d+ tokens", words).groups()
    assert float(sizes[0]) == pytest.approx(float(sizes[1]), rel=0.01)  # but for the digits of a longer position
    heights = re.findall(r"[ML][\d.]+ ([\d.]+)", page.locator("#memory-plot .line").get_attribute("d"))
    assert len(heights) == 2
    assert float(heights[0]) == pytest.approx(float(heights[1]), abs=0.2)
    expect(page.locator("li.assistant").last.locator(".facts")).to_contain_text("24 tokens")
    expect(page.locator("li.assistant").last.locator(".facts")).to_contain_text("remembered")


def test_an_answer_is_stopped_and_gone_on_from(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    with slowly(0.02):
        send(page, "Count")
        expect(page.locator("li.assistant .text")).not_to_be_empty()
        page.locator("#message").fill("Typed meanwhile")
        page.locator("#message").press("Enter")  # is not lost where it cannot be sent
        expect(page.locator("#composer-fault")).to_contain_text("not finished")
        page.locator("#message").press("Escape")
        rest(page)
    expect(page.locator("li.assistant .facts")).to_contain_text("stopped")
    expect(page.locator("#message")).to_have_value("Typed meanwhile")
    expect(page.locator("#message")).to_be_focused()
    assert 0 < len(kept(page)[-1]["text"]) < SETTINGS["longest"]
    page.locator("#message").press("Enter")
    expect(page.locator("li.assistant")).to_have_count(2)
    rest(page)
    talk = messages(page)
    assert [one["role"] for one in talk] == ["user", "assistant"] * 2
    assert talk[3]["content"] == afresh(served, talk[:3])
    # Before the first word there is no answer to keep, and the question can be sent again.
    with slowly(0.5):
        send(page, "Again")
        page.locator("#stop").click()
        rest(page)
    expect(page.locator("li.assistant")).to_have_count(2)
    press(page, "Answer", "user", 2)
    expect(page.locator("li.assistant")).to_have_count(3)
    rest(page)
    talk = messages(page)
    assert talk[5]["content"] == afresh(served, talk[:5])


# ---- forks


def test_messages_are_edited_answered_again_and_rewound(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    for text in ("First", "Second", "Third"):
        ask(page, text)
    whole = messages(page)
    page.locator("#message").fill("a draft")

    press(page, "Edit", "user", 1)
    expect(page.locator("#message")).to_have_value("Second")
    assert messages(page) == whole[:2]
    page.locator("#message").press("Escape")  # leaves everything as it was
    assert messages(page) == whole
    expect(page.locator("#message")).to_have_value("a draft")

    press(page, "Edit", "user", 1)
    page.locator("#message").type(" thoughts")
    page.reload()  # loses neither what is edited nor what was typed before
    expect(page.locator("#message")).to_have_value("Second thoughts")
    page.locator("#leave-editing").click()
    assert messages(page) == whole
    expect(page.locator("#message")).to_have_value("a draft")

    press(page, "Edit", "user", 1)
    send(page, "Another second")
    expect(page.locator("li.assistant")).to_have_count(2)
    rest(page)
    other = messages(page)
    assert other[:2] == whole[:2]
    assert other[3]["content"] == afresh(served, other[:3]) != whole[3]["content"]
    expect(page.locator("#message")).to_have_value("a draft")

    versions = page.locator("li.user").nth(1).locator(".versions")
    expect(versions).to_contain_text("2 of 2")
    versions.get_by_role("button", name="Earlier version").click()
    assert messages(page) == whole
    expect(page.locator("li.user").nth(1).locator(".versions")).to_contain_text("1 of 2")

    press(page, "Rewind", "assistant", 0)
    rest(page)
    assert messages(page) == whole[:2]
    press(page, "Show what followed", "assistant", 0)
    assert messages(page) == other
    press(page, "Again", "assistant", 1)
    expect(page.locator("li.assistant").nth(1).locator(".versions")).to_contain_text("2 of 2")
    rest(page)
    assert messages(page) == other  # at temperature 0 the same words


def test_rewinding_to_where_no_state_is_forks_a_later_one(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    for text in ("First", "Second"):
        ask(page, text)
    talk, nodes = messages(page), kept(page)
    with page.expect_response(re.compile("/fork$")) as answer:
        press(page, "Rewind", "user", 1)
    rest(page)
    forked = answer.value.json()
    assert (forked["parent"], forked["message_count"]) == (nodes[3]["state"]["id"], 3)
    assert kept(page)[-1]["state"]["id"] == forked["id"]
    press(page, "Answer", "user", 1)
    expect(page.locator("li.assistant")).to_have_count(2)
    rest(page)
    assert messages(page) == talk


def test_a_branch_is_a_conversation_of_its_own(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    for text in ("First", "Second"):
        ask(page, text)
    whole = messages(page)
    press(page, "Branch", "assistant", 0)
    expect(page.locator("#conversations li")).to_have_count(2)
    expect(page.locator("#messages > li")).to_have_count(2)
    assert messages(page) == whole[:2]
    original = page.locator("#conversations li").filter(has_not=page.locator("[aria-current]"))
    original.hover()
    original.get_by_role("button", name=re.compile("^Delete")).click()
    original.get_by_role("button", name=re.compile("^Really delete it")).click()
    expect(page.locator("#conversations li")).to_have_count(1)
    ask(page, "Third")
    talk = messages(page)
    assert talk[:2] == whole[:2]
    assert talk[3]["content"] == afresh(served, talk[:3])
    expect(page.locator("#notice")).to_be_empty()  # its state was not that of the deleted one


def test_states_that_the_server_lost_are_read_again(served: Served, visit: Visitor) -> None:
    page = visit(served.url, mishaps="status of 404")
    ask(page, "First")
    with served.client() as client:
        for state in states(served):
            client.delete(f"/v1/states/{state['id']}")
    page.reload()
    expect(page.locator("#notice")).to_contain_text("does not have this conversation in memory")
    ask(page, "Second")
    expect(page.locator("#notice")).to_contain_text("read again")
    talk = messages(page)
    assert talk[3]["content"] == afresh(served, talk[:3])


# ---- files


def test_a_conversation_is_saved_and_loaded(served: Served, visit: Visitor, tmp_path: Path) -> None:
    page = visit(served.url, mishaps="status of 400")
    ask(page, "Remember this")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    assert download.value.suggested_filename == "remember-this.tar"
    path = tmp_path / "saved.tar"
    download.value.save_as(path)
    rest(page)
    talk = messages(page)
    ask(page, "And go on")
    whole = messages(page)

    elsewhere = visit(served.url)
    elsewhere.locator("#state-file").set_input_files(path)
    expect(elsewhere.locator("#messages > li")).to_have_count(2)
    assert [text for _, text in told(elsewhere)] == [one["content"].rstrip() for one in talk]
    ask(elsewhere, "And go on")
    assert [text for _, text in told(elsewhere)] == [one["content"].rstrip() for one in whole]

    torn = tmp_path / "torn.tar"
    torn.write_bytes(path.read_bytes()[:-3000])
    page.locator("#state-file").set_input_files(torn)
    expect(page.locator("#load-fault")).to_have_text(re.compile(r"^State.*\.$"))
    assert messages(page) == whole


def pieces(served: Served) -> int:
    """States of documents that are being read, or were."""
    return sum(state["message_count"] is None for state in states(served))


def test_a_long_text_is_read_in_view_and_asked_about(served: Served, visit: Visitor) -> None:
    page = visit(served.url, mishaps="ERR_FAILED")
    text = "".join(f"Line {number}: naïve — {number**3}\n" for number in range(1500))
    with slowly(0.01):
        add_text(page, "lines.txt", text.encode())
        expect(page.get_by_role("progressbar")).to_be_visible()
        expect(page.locator("li.document")).to_contain_text(re.compile(r"reading, [1-9]\d? % of"))
        page.locator("#message").press("Escape")
        rest(page)
    expect(page.locator("li.document")).to_contain_text("% of")
    assert settled(served.engine)
    unnamed = max(0, pieces(served) - 1)  # of an answer that was under way when it was stopped
    page.route("**/v1/states", lambda route: route.abort(), times=1)
    press(page, "Go on reading", "document", 0)
    expect(page.locator("li.document .fault")).to_contain_text("The server cannot be reached")
    press(page, "Go on reading", "document", 0)
    expect(page.locator("li.document")).to_contain_text("read in")
    rest(page)
    (node,) = kept(page)
    assert node["state"]["tokens"] == len(text.encode())
    assert node["text"] is None  # too long for the browser to keep; the server has it
    expect(page.locator("#announcer")).to_contain_text("lines.txt was read")
    ask(page, "What was in line 17?")
    plain = f"{text}\n\nUser:\nWhat was in line 17?\n\nAssistant:\n"
    with served.client() as client:
        same = client.post("/v1/completions", json={"prompt": plain, "temperature": 0, "max_tokens": 24}).json()
    assert kept(page)[-1]["text"] == same["choices"][0]["text"]
    sizes = [size for node in kept(page) for _, size in node["bytes"]]
    assert max(sizes) - min(sizes) < 100  # however much was read
    # Only the end of the reading is kept on the server.
    assert pieces(served) == 1 + unnamed
    page.reload()
    ask(page, "And in the next?")
    talk = messages(page)
    assert talk[-1]["content"] == afresh(served, talk[1:-1], state=node["state"]["id"])


def test_files_that_cannot_be_read_are_told(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    for name, content, reason in (
        ("picture.png", b"\x89PNG\xff\xfe", "picture.png is not text in UTF-8"),
        ("nothing.txt", b"", "nothing.txt is empty"),
    ):
        add_text(page, name, content)
        expect(page.locator("#composer-fault")).to_contain_text(reason)
    drop = """(name) => {
        const files = new DataTransfer();
        files.items.add(new File(["A dropped text."], name));
        window.dispatchEvent(new DragEvent("drop", { dataTransfer: files, cancelable: true }));
    }"""
    page.evaluate(drop, "dropped.md")
    expect(page.locator("li.document")).to_contain_text("15 tokens")
    expect(page.locator("#composer-fault")).to_be_empty()
    paste = """(text) => {
        const data = new DataTransfer();
        data.setData("text/plain", text);
        const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
        document.getElementById("message").dispatchEvent(event);
    }"""
    rest(page)
    page.evaluate(paste, "word " * 5000)
    expect(page.locator("li.document").nth(1)).to_contain_text("25,000 characters")
    rest(page)

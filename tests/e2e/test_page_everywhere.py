"""The page after a restart of the server, with keys, and for everybody: without a mouse, without sharp eyes, on a small
screen. What it runs, and its parts alone."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isotach.data.tokenizer import ByteTokenizer
from isotach.serve.http import PAGE
from isotach.train.checkpoint import seal, step_folder
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
    told,
    writer,
)
from tests.e2e.serving import KEYS, Served, reading_slowly, serving

# Contrast of every visible text with what is behind it (WCAG 2.2, 1.4.3), and of the edges of fields (1.4.11).
CONTRAST = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
    const behind = (element) => {
        if (!element) return channels(getComputedStyle(document.documentElement).backgroundColor).slice(0, 3);
        const own = channels(getComputedStyle(element).backgroundColor);
        return own.length === 4 && own[3] === 0 ? behind(element.parentElement)
            : over(own, own[3] < 1 ? behind(element.parentElement) : [0, 0, 0]);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    const seen = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    for (const element of document.querySelectorAll("body *")) {
        const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.textContent.trim());
        if (!seen(element) || element.disabled || element.closest(".unseen, .skip, svg, #drop")) continue;
        const style = getComputedStyle(element);
        const name = `${element.tagName}#${element.id}.${element.className} ${element.textContent.slice(0, 20)}`;
        if (texts.length || element.matches("input")) {
            found.push([name, ratio(channels(style.color), behind(element)), 4.5]);
        }
        if (element.matches("input, #composer")) {
            found.push([`edge ${name}`, ratio(channels(style.borderTopColor), behind(element.parentElement)), 3]);
        }
    }
    return found;
}"""

# Names of controls, unique ids, headings in order, targets of at least 24 pixels (2.5.8).
STRUCTURE = """() => {
    const faults = [];
    const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
    for (const id of ids.filter((id, place) => ids.indexOf(id) !== place)) faults.push(`two elements #${id}`);
    for (const attribute of ["aria-describedby", "aria-labelledby", "aria-controls", "for"]) {
        for (const element of document.querySelectorAll(`[${attribute}]`)) {
            for (const id of element.getAttribute(attribute).split(" ")) {
                if (!ids.includes(id)) faults.push(`${attribute} names no #${id}`);
            }
        }
    }
    for (const control of document.querySelectorAll("button, input, textarea, summary, a, progress, [role=img]")) {
        const labelled = control.labels?.length || control.textContent.trim();
        if (!labelled && !control.getAttribute("aria-label")) faults.push(`no name: ${control.outerHTML}`);
        const shows = control.checkVisibility() && !control.matches(".skip, progress, [role=img]");
        const { width, height } = control.getBoundingClientRect();
        if (shows && (width < 24 || height < 24)) faults.push(`small: ${control.outerHTML} ${width} × ${height}`);
    }
    const images = [...document.images].filter((image) => !image.hasAttribute("alt"));
    if (images.length) faults.push("an image without alt");
    if (document.querySelectorAll("h1").length !== 1 || document.querySelectorAll("main").length !== 1) {
        faults.push("expected one h1 and one main");
    }
    if (!document.documentElement.lang) faults.push("no language");
    return faults;
}"""


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


# ---- reload, restart, keys


@contextlib.contextmanager
def command(run: Path, port: int) -> Iterator[str]:
    """`isotach serve`, as a person starts and stops it."""
    program = "from isotach.cli import main; raise SystemExit(main())"
    arguments = ["serve", str(run), "--port", str(port), "--device", "cpu"]
    settings: Any = {"text": True, "cwd": Path(__file__).parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    log = run / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=errors, **settings
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port}" in process.stdout.readline(), log.read_text()
            answering(port)
            yield f"http://127.0.0.1:{port}"
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()


def answering(port: int, *, seconds: float = 20) -> None:
    """Wait until something listens there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.slow
def test_after_a_restart_of_the_server_one_goes_on(tmp_path: Path, visit: Visitor) -> None:
    checkpoint = step_folder(tmp_path, 1)
    checkpoint.mkdir(parents=True)
    writer().save(checkpoint)
    ByteTokenizer().save(checkpoint)
    (checkpoint / "training.safetensors").touch()
    (checkpoint / "training.json").write_text("{}")
    seal(checkpoint)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with command(tmp_path, port) as url:
        page = visit(url, mishaps="ERR_CONNECTION_REFUSED|status of 503")
        ask(page, "First")
        page.locator("#message").type("a draft that was not sent")
        page.reload()
        expect(page.locator("#message")).to_have_value("a draft that was not sent")
        talk = messages(page)
        assert [text for _, text in told(page)] == [one["content"].rstrip() for one in talk]
        ask(page, "Second")
    send(page, "Into the void")
    fault = page.locator("li.user").nth(2).locator(".fault")
    expect(fault).to_have_text("The server cannot be reached; try again when it is running.")
    expect(fault).to_have_attribute("role", "alert")
    with command(tmp_path, port):
        page.reload()
        expect(page.locator("#notice")).to_be_empty()
        expect(page.locator("li.user").nth(2)).to_contain_text("Into the void")
        with page.expect_request(re.compile("/completions$")) as asked:
            press(page, "Send again", "user", 2)
        expect(page.locator("li.assistant")).to_have_count(3)
        rest(page)
        nodes = kept(page)
        body = asked.value.post_data_json
        assert body["state"] == nodes[3]["state"]["id"]  # of the server before
        assert body["messages"] == [{"role": "user", "content": "Into the void"}]
        assert nodes[5]["facts"]["skipped"] >= nodes[3]["state"]["tokens"] - 1
        fresh = page.request.post(
            f"{url}/v1/chat/completions",
            data={"messages": messages(page)[:5], "temperature": 0, "max_tokens": SETTINGS["longest"]},
        ).json()
        assert nodes[5]["text"] == fresh["choices"][0]["message"]["content"]


def test_another_browser_finds_what_is_on_the_server(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    ask(page, "Found elsewhere")
    talk = messages(page)
    other = visit(served.url)
    other.locator("#elsewhere").get_by_role("button", name=re.compile("^Found elsewhere")).first.click()
    expect(other.locator("#messages > li")).to_have_count(2)
    assert [text for _, text in told(other)] == [one["content"].rstrip() for one in talk]
    ask(other, "Go on")
    assert kept(other)[-1]["text"] == afresh(served, messages(other)[:3])


def test_what_was_read_before_a_found_conversation_is_not_left_out(tmp_path: Path, visit: Visitor) -> None:
    """The page shows its messages only, and must not tell them afresh as if that were all."""
    with serving(tmp_path, decoder=writer()) as served:
        page = visit(served.url)
        with served.client() as client:
            before = client.post("/v1/states", json={"prompt": "What was read before."}).json()
        add_text(page, "before.txt", b"What was read before.")
        expect(page.locator("li.document")).to_contain_text("21 tokens")
        rest(page)
        ask(page, "First")
        ask(page, "Second")
        talk = [node["text"] for node in kept(page)[1:]]
        other = visit(served.url)
        other.locator("#elsewhere").get_by_role("button").first.click()
        expect(other.locator("#messages > li")).to_have_count(5)
        expect(other.locator("#title")).to_have_text("First")
        for place in (1, 0):  # at temperature 0 the same words, if the same was read
            press(other, "Again", "assistant", place)
            rest(other)
            assert [node["text"] for node in kept(other)[1:]] == talk[: 2 * place + 2]
        press(other, "Edit", "user", 0)
        send(other, "Another first")
        expect(other.locator("li.assistant")).to_have_count(1)
        rest(other)
        assert kept(other)[-1]["text"] == afresh(
            served, [{"role": "user", "content": "Another first"}], state=before["id"]
        )


def test_the_first_message_of_an_imported_conversation_can_be_edited(
    served: Served, visit: Visitor, tmp_path: Path
) -> None:
    page = visit(served.url)
    ask(page, "First")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    download.value.save_as(tmp_path / "saved.tar")
    other = visit(served.url)
    other.locator("#state-file").set_input_files(tmp_path / "saved.tar")
    expect(other.locator("#messages > li")).to_have_count(2)
    press(other, "Edit", "user", 0)
    send(other, "Another first")
    expect(other.locator("li.user")).to_contain_text("Another first")
    rest(other)
    assert messages(other)[-1]["content"] == afresh(served, messages(other)[:1])


def test_two_tabs_lose_nothing_of_each_other(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    ask(page, "First")
    tab = page.context.new_page()
    tab.goto(served.url)
    expect(tab.locator("#messages > li")).to_have_count(2)
    ask(page, "Second, here")
    ask(tab, "Second, there")
    for one in (page, tab):
        one.reload()
        said = one.locator("li.user").nth(1)
        expect(said.locator(".versions")).to_contain_text("of 2")
        found = {said.locator(".text").text_content()}
        said.get_by_role("button", name=re.compile("(Earlier|Later) version"), disabled=False).click()
        expect(said.locator(".text")).not_to_have_text(found.copy().pop())
        found.add(said.locator(".text").text_content())
        assert found == {"Second, here", "Second, there"}
    tab.locator("#conversations li").first.hover()
    tab.get_by_role("button", name=re.compile("^Delete")).first.click()
    tab.get_by_role("button", name=re.compile("^Really delete it")).click()
    expect(page.locator("#messages > li")).to_have_count(0)  # and it does not come back


def test_it_is_shown_how_far_a_long_message_is_read(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    with reading_slowly(0.5):
        send(page, "long " * 1200)
        expect(page.locator("li.assistant .text")).to_have_text(re.compile(r"^Reading, \d+ % of 6,0\d\d tokens$"))
        rest(page)
    assert messages(page)[-1]["content"] == afresh(served, messages(page)[:1])


def test_a_server_with_keys_is_given_one(tmp_path: Path, visit: Visitor) -> None:
    with serving(tmp_path, decoder=writer(), keys=True) as served:
        page = visit(served.url, mishaps="status of 401")
        expect(page.get_by_label("This server asks for a key")).to_be_focused()
        send(page, "Sent without a key")
        expect(page.locator("li.user .fault")).to_contain_text("asks for a key")
        page.get_by_label("This server asks for a key").fill("b" * 31)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#key-fault")).to_have_text("This is not a key of this server; try another.")
        page.get_by_label("This server asks for a key").fill(KEYS["anna"])
        page.keyboard.press("Enter")
        expect(page.locator("#key-panel")).to_be_hidden()
        expect(page.locator("#model")).to_have_text("tiny")
        press(page, "Send again", "user", 0)
        expect(page.locator("li.assistant .facts")).to_contain_text("24 tokens")
        page.reload()
        ask(page, "Known by now")
        page.locator("#settings summary").click()
        page.get_by_role("button", name="Forget the key").click()
        expect(page.locator("#key-panel")).to_be_visible()
        assert KEYS["anna"] not in page.evaluate("JSON.stringify(localStorage)")


# ---- for everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_seen_and_has_a_name(served: Served, visit: Visitor, scheme: str) -> None:
    page = visit(served.url, mishaps="status of", color_scheme=scheme)
    page.locator("#settings summary").click()
    ask(page, "First")
    press(page, "Again", "assistant", 0)
    rest(page)
    add_text(page, "bad.txt", b"\xff")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json={"error": {"message": "no"}}))
    send(page, "Refused")
    expect(page.locator("li.user .fault")).to_be_visible()
    expect(page.locator("#key-panel")).to_be_visible()
    page.mouse.move(0, 0)
    page.locator("#message").focus()
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 900})
        found = page.evaluate(CONTRAST)
        assert len(found) > 15
        assert [(name, round(ratio, 2)) for name, ratio, least in found if ratio < least] == []
        assert page.evaluate(STRUCTURE) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_keyboard_is_enough(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    ask(page, "First")
    page.reload()
    expect(page.locator("#message")).to_be_focused()
    page.locator(".skip").focus()
    outlined = """() => {
        const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
        const around = getComputedStyle(document.getElementById("composer"));
        const own = outlineStyle !== "none" && parseFloat(outlineWidth) >= 1;
        return own || (document.activeElement.id === "message" && around.outlineStyle !== "none");
    }"""
    order = ["To the message field"]
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.id || document.activeElement.innerText")
        assert page.evaluate(outlined), focused
        order.append(focused)
        if focused == "send":
            break
    assert page.evaluate("document.querySelector('a, button, input, textarea, summary').matches('.skip')")
    assert order[1] == "new"
    assert order[-3:] == ["message", "attach", "send"]
    assert order.index("load") < order.index("save") < order.index("Again")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.get_by_role("button", name="Again: another answer").focus()
    page.keyboard.press("Enter")
    expect(page.locator("li.assistant .versions")).to_contain_text("2 of 2")
    rest(page)
    page.get_by_role("button", name="Earlier version").focus()
    page.keyboard.press("Enter")
    expect(page.locator("li.assistant .versions")).to_contain_text("1 of 2")
    assert page.evaluate("document.activeElement.closest('li.assistant') !== null")  # the focus stays there


def test_a_narrow_screen_has_a_menu(served: Served, visit: Visitor) -> None:
    page = visit(served.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Menu").click()
    expect(page.locator("#menu")).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#new")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    expect(page.locator("#menu")).to_be_focused()
    page.locator("#message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("li.assistant .facts")).to_contain_text("24 tokens")
    expect(page.locator("li.assistant .actions")).to_be_visible()
    page.get_by_role("button", name="Menu").click()
    page.get_by_role("button", name="New conversation", exact=True).click()
    expect(page.locator("#side")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_visible()


# ---- the parts


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:src|href)="([^"#]+)"', html):
        assert (PAGE / name).is_file()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
    names = {path.name for path in PAGE.iterdir()}
    for path in PAGE.glob("*.js"):
        code = path.read_text(encoding="utf-8")
        assert set(re.findall(r'from "\./([^"]+)"', code)) <= names
        assert re.findall(r"https?://\S+?(?=[\"'])", code) in ([], ["http://www.w3.org/2000/svg"])
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", code)


def test_a_browser_runs_nothing_else(served: Served, visit: Visitor) -> None:
    page = visit(served.url, mishaps="Content Security Policy")
    with served.client() as client:
        policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    ask(page, "<img src=x onerror='window.ran = 1'>")
    assert page.evaluate("window.ran") is None
    assert page.locator("#messages img").count() == 0


def test_events_are_the_same_however_the_stream_is_cut(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    streams = [
        ': keep-alive\n\ndata: {"a": "ü\\n"}\n\ndata: one\ndata:two\n\nevent: x\ndata: [DONE]\n\n',
        "data: a\r\n\r\n: comment\r\n\r\ndata: b\r\n\r\ndata: cut off",
        ": progress 512/9000\n\n: progress 9",
    ]
    expected = [['{"a": "ü\\n"}', "one\ntwo", "[DONE]"], ["a", "b"], ["512 of 9000"]]
    read = """async ([stream, cuts]) => {
        const { parseEvents } = await import("/server.js");
        const all = [];
        let buffer = "";
        for (const [place, from] of cuts.entries()) {
            const { events, progress, rest } = parseEvents(buffer + stream.slice(from, cuts[place + 1]));
            all.push(...events);
            if (progress) all.push(`${progress.read} of ${progress.total}`);
            buffer = rest;
        }
        return all;
    }"""
    for stream, events in zip(streams, expected, strict=True):
        for size in range(1, len(stream) + 1):
            assert page.evaluate(read, [stream, list(range(0, len(stream), size))]) == events


def test_a_text_is_cut_without_loss(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    cut = """async ([text, length]) => {
        const { cut } = await import("/conversation.js");
        const pieces = [];
        for (let from = 0; from < text.length; ) {
            const to = cut(text, from, length);
            pieces.push(text.slice(from, to));
            from = to;
        }
        return pieces;
    }"""
    for text in ("word " * 40, "line\n" * 30 + "x" * 50, "🦊" * 60, "a🦊" * 41, "\n", "x"):
        for length in (2, 3, 7, 16, 1000):
            pieces = page.evaluate(cut, [text, length])
            assert "".join(pieces) == text
            assert all(pieces)
            assert all(len(piece) <= length + 1 for piece in pieces)
            assert not any("\udc00" <= piece[0] <= "\udfff" for piece in pieces)
    assert page.evaluate(cut, ["one two\nthree four five", 12]) == ["one two\n", "three four", " five"]


def test_states_are_given_up_from_the_inside(served: Served, visit: Visitor) -> None:
    """What is given up can be forked from what stays; ends, branches, documents and the tip stay."""
    page = visit(served.url)
    left = """async (room) => {
        const tree = await import("/conversation.js");
        let talk = tree.begin("c", 0);
        const state = (id, count) => ({ id, tokens: 1, bytes: 10, message_count: count });
        talk = tree.add(talk, { id: "text", role: "document", name: "x", state: state("text", null) });
        for (let turn = 0; turn < 6; turn += 1) {
            talk = tree.add(talk, { id: `q${turn}`, role: "user", text: "q" });
            const after = state(`a${turn}`, 2 * turn + 2);
            talk = tree.add(talk, { id: `a${turn}`, role: "assistant", text: "a", state: after });
        }
        talk = tree.add(tree.rewind(talk, "a2"), { id: "other", role: "user", text: "q" });
        const gone = new Set(tree.surplus(talk, room));
        const rest = tree.forget(talk, (id) => gone.has(id));
        const from = [...gone].map((id) => tree.rewindable(rest, id));
        return [[...gone], tree.states(rest), from];
    }"""
    for room, gone in ((70, []), (60, ["a0"]), (35, ["a0", "a1", "a3", "a4"]), (0, ["a0", "a1", "a3", "a4"])):
        given, stay, sources = page.evaluate(left, room)
        assert given == gone
        assert stay == [name for name in ("text", "a0", "a1", "a2", "a3", "a4", "a5") if name not in gone]
        assert all(source["state"] in stay for source in sources)
        counts = {"a0": 2, "a1": 4, "a3": 8, "a4": 10}
        assert [source["messages"] for source in sources] == [counts[name] for name in gone]


def test_numbers_in_words(served: Served, visit: Visitor) -> None:
    page = visit(served.url)
    script = """async () => {
        const { size, time, plural, slug, heading } = await import("/format.js");
        const { paceOf } = await import("/conversation.js");
        const { plot } = await import("/gauge.js");
        const even = Array.from({ length: 101 }, (_, place) => 50 * place);
        return {
            sizes: [0, 999, 1000, 82728, 999_999, 1.5e9].map(size),
            times: [0.0421, 8.116, 999.4, 1500, 180_000].map(time),
            words: [plural(1, "token"), plural(12431, "token"), slug("Été & co: 2"), slug("!"), heading(" a\\n b ", 9)],
            long: heading("word ".repeat(40)).length,
            pace: paceOf(even, { before: 1000, written: 101 }),
            dense: paceOf(even, { before: 0, written: 202 })[0][1],
            none: [paceOf([], { before: 0, written: 0 }), paceOf([1], { before: 0, written: 1 })],
            flat: plot([[100, 5], [1000, 5], [1001, 5]], { width: 100, height: 30 }),
            empty: plot([], { width: 100, height: 30 }),
        };
    }"""
    found = page.evaluate(script)
    assert found["sizes"] == ["0 B", "999 B", "1 kB", "82.7 kB", "1 MB", "1.5 GB"]
    assert found["times"] == ["0.0421 ms", "8.12 ms", "999 ms", "1.5 s", "3 min"]
    assert found["words"] == ["1 token", "12,431 tokens", "été-co-2", "conversation", "a b"]
    assert found["long"] <= 60
    assert [ms for _, ms in found["pace"]] == pytest.approx([50] * 8)
    assert [at for at, _ in found["pace"]][-1] == 1101
    assert found["dense"] == pytest.approx(25)
    assert found["none"] == [[], []]
    assert len({y for _, y in found["flat"]["places"]}) == 1
    assert len(found["flat"]["places"]) == 2
    assert found["empty"]["path"] == ""

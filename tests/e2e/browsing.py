"""A page of the server in headless Chromium: what a person does there, and what is there then.

A test that uses a `Visitor` also fails on an error in the browser's console and on a request to anywhere else.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")

from isotach.models.decoder import Decoder, ModelConfig  # noqa: E402
from tests.e2e.serving import Served  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SETTINGS = {"temperature": 0, "longest": 24}
expect = playwright.expect
expect.set_options(timeout=20_000)


def writer() -> Decoder:
    """Writes printable ASCII and never ends by itself, so that its answers can be compared and stopped."""
    config = ModelConfig(vocab=257, width=32, depth=2, heads=2, hidden=48, tie=False)
    decoder = Decoder(config, seed=0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(10)
        decoder.unembed.weight[[*range(32), *range(127, 257)]] = 0
    return decoder


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium; on Debian and Ubuntu: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """visitor(url) is the page in a browser profile of its own; what matches `mishaps` may be in its console."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._left = contextlib.ExitStack()

    def __call__(self, url: str, *, mishaps: str = "(?!)", **settings: Any) -> Any:
        kept = [{"name": "isotach/settings", "value": json.dumps(SETTINGS)}]
        storage = {"cookies": [], "origins": [{"origin": url, "localStorage": kept}]}
        context = self._browser.new_context(storage_state=storage, **settings)
        self._left.callback(context.close)
        context.set_default_timeout(20_000)
        page = context.new_page()
        errors: list[str] = []
        addresses: list[str] = []
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(url)

        def check() -> None:
            assert [error for error in errors if not re.search(mishaps, error)] == []
            assert [one for one in addresses if not one.startswith((f"{url}/", "blob:", "data:"))] == []

        self._left.callback(check)
        return page

    def leave(self) -> None:
        """Close the pages, and check what they did."""
        self._left.close()


# ---- what a person does


def ask(page: Any, text: str) -> None:
    answers = page.locator("li.assistant").count()
    send(page, text)
    expect(page.locator("li.assistant")).to_have_count(answers + 1)
    rest(page)


def send(page: Any, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def rest(page: Any) -> None:
    """Wait until nothing is written or read."""
    expect(page.locator("#stop")).to_be_hidden()


def press(page: Any, action: str, role: str, place: int) -> None:
    message = page.locator(f"li.{role}").nth(place)
    message.hover()
    message.get_by_role("button", name=re.compile(f"^{action}")).click()


def add_text(page: Any, name: str, content: bytes) -> None:
    page.locator("#text-file").set_input_files([{"name": name, "mimeType": "text/plain", "buffer": content}])


# ---- what there is then


def told(page: Any) -> list[tuple[str, str]]:
    """Role and text of the messages on the page."""
    items = page.locator("#messages > li").all()
    return [(item.get_attribute("class"), item.locator(".text, strong").first.text_content()) for item in items]


def kept(page: Any) -> list[dict[str, Any]]:
    """The same as the browser keeps it, letter for letter."""
    storage = page.evaluate("({...localStorage})")
    conversation = json.loads(storage[f"isotach/conversation/{json.loads(storage['isotach/current'])}"])
    nodes, at = [], conversation["tip"]
    while at is not None:
        nodes.insert(0, conversation["nodes"][at])
        at = nodes[0]["parent"]
    return nodes


def messages(page: Any) -> list[dict[str, str]]:
    return [{"role": node["role"], "content": node["text"]} for node in kept(page)]


def afresh(served: Served, talk: list[dict[str, str]], **more: Any) -> str:
    """What the model says to a conversation that is told from its beginning."""
    body = {"messages": talk, "temperature": SETTINGS["temperature"], "max_tokens": SETTINGS["longest"], **more}
    with served.client() as client:
        text: str = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


def states(served: Served) -> list[dict[str, Any]]:
    with served.client() as client:
        listed: list[dict[str, Any]] = client.get("/v1/states?limit=1000").json()["data"]
    return listed

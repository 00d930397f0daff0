"""The page in a real browser, over the real server."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import some_ports
from tests.system.web.conftest import HOSTILE_NAME, Site, site

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
expect = sync_api.expect

pytestmark = [pytest.mark.triton, pytest.mark.browser]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MakePage = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        # No sandbox: in a container it lacks the rights to make one, and it visits nothing but ours.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def make_page(browser: Any) -> Iterator[MakePage]:
    """A page in a fresh profile. At the end: no script failed, nothing was blocked, nothing was asked of others."""
    contexts, errors, addresses = [], [], []

    def make(address: str, **options: Any) -> Any:
        contexts.append(browser.new_context(locale="en-US", **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not errors
    assert addresses
    assert all(re.match(r"(http://127\.0\.0\.1:\d+|blob:http://127\.0\.0\.1:\d+)/", one) for one in addresses)


def search(page: Any, query: str) -> None:
    page.fill("#query", query)
    page.press("#query", "Enter")


def first_name(page: Any) -> Any:
    return page.locator(".grid li .name").first


def test_a_phrase_finds_its_picture(sample_site: Site, make_page: MakePage) -> None:
    """In place, with an address of its own that the back button leaves; pictures are there and named."""
    page = make_page(sample_site.address)
    expect(page.locator(".empty")).to_be_visible()
    page.evaluate("window.isSamePage = true")
    search(page, "哭泣的猫")
    expect(first_name(page)).to_have_text("哭泣的猫")
    expect(page.locator("h1")).to_have_text("Results for “哭泣的猫”")
    assert re.fullmatch(r"embedding [\d.]+ ms · ranking [\d.]+ ms", page.locator(".took").inner_text())
    assert re.fullmatch(r"0\.\d{3}", page.locator(".grid .cosine").first.inner_text())
    image = page.locator(".grid img").first
    expect(image).to_have_attribute("alt", "哭泣的猫")
    expect(image).not_to_have_js_property("naturalWidth", 0)
    search(page, "墨镜")
    expect(first_name(page)).to_have_text("墨镜")
    assert page.evaluate("window.isSamePage")
    page.go_back()
    expect(first_name(page)).to_have_text("哭泣的猫")
    assert page.input_value("#query") == "哭泣的猫"
    page.click("text=Show more")
    expect(page.locator(".grid li")).to_have_count(48)


def test_it_works_without_a_script(sample_site: Site, make_page: MakePage) -> None:
    page = make_page(sample_site.address, java_script_enabled=False)
    expect(page.locator(".upload")).to_be_hidden()
    search(page, "生日蛋糕")
    expect(first_name(page)).to_have_text("水果蛋糕")
    page.click(".grid a.picture >> nth=0")
    expect(page.locator("h1")).to_have_text("Pictures like “水果蛋糕”")
    expect(first_name(page)).to_have_text("水果蛋糕")


def test_the_keyboard_reaches_everything(sample_site: Site, make_page: MakePage) -> None:
    """`/` leads to the field, Tab to the tiles, Enter to pictures like one; each is seen to have the focus."""
    page = make_page(f"{sample_site.address}/?q=%E5%A2%A8%E9%95%9C")
    page.keyboard.press("/")
    expect(page.locator("#query")).to_be_focused()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('a.picture')"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Pictures like “墨镜”")
    expect(page.locator(".took")).to_have_text(re.compile("^ranking"))


def test_every_control_and_picture_has_a_name(sample_site: Site, make_page: MakePage) -> None:
    """In both languages, without sideways scrolling on a telephone."""
    for language, expected in (("zh", "搜索"), ("en", "Search")):
        address = f"{sample_site.address}/?similar=5&lang={language}"
        page = make_page(address, viewport={"width": 360, "height": 700}, color_scheme="dark")
        expect(page.get_by_role("button", name=expected)).to_be_visible()
        assert page.evaluate("[...document.images].every((one) => one.alt)")
        assert page.evaluate("[...document.querySelectorAll('input:not([type=hidden])')].every((o) => o.labels.length)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.documentElement.lang").startswith(language)


def test_a_chosen_picture_finds_itself(sample_site: Site, make_page: MakePage, emoji: dict[str, bytes]) -> None:
    page = make_page(sample_site.address)
    picture = {"name": "my.png", "mimeType": "image/png", "buffer": emoji["纸杯蛋糕"]}
    page.set_input_files("#file", picture)
    expect(first_name(page)).to_have_text("纸杯蛋糕")
    expect(page.locator("#preview img")).to_be_visible()
    expect(page.locator(".tags a").first).to_be_visible()
    page.click(".tags a >> nth=0")
    expect(page.locator("h1")).to_have_text(re.compile("^Results for"))


def test_a_dropped_picture_finds_itself(sample_site: Site, make_page: MakePage, emoji: dict[str, bytes]) -> None:
    page = make_page(sample_site.address)
    dropped = page.evaluate_handle(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(emoji["墨镜"]).decode(),
    )
    page.dispatch_event("main", "dragover", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("main", "drop", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_be_hidden()
    expect(first_name(page)).to_have_text("墨镜")


def test_a_bad_picture_gets_the_servers_sentence(sample_site: Site, make_page: MakePage, tmp_path: Path) -> None:
    """One too large is not even sent. The next search is none the worse."""
    page = make_page(sample_site.address)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.get_by_role("alert")).to_contain_text("image is not a readable picture file")
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate((16 << 20) + 1)
    page.set_input_files("#file", large)
    expect(page.get_by_role("alert")).to_contain_text("The picture is too large; the limit is 16 MiB.")
    search(page, "墨镜")
    expect(first_name(page)).to_have_text("墨镜")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("with_script", [True, False])
def test_markup_is_shown_as_text(folder_site: Site, make_page: MakePage, with_script: bool) -> None:
    """In a query, and in the name of a picture."""
    page = make_page(folder_site.address, java_script_enabled=with_script)
    query = '"><script>window.hit=1</script><img src=x onerror=window.hit=1>墨镜{}'
    search(page, query)
    expect(page.locator("h1")).to_have_text(f"Results for “{query}”")
    search(page, "墨镜")
    expect(page.locator(".grid .name", has_text=HOSTILE_NAME)).to_be_visible()
    page.click(f".grid li:has-text({HOSTILE_NAME!r}) a.picture")
    expect(page.locator("h1")).to_have_text(f"Pictures like “{HOSTILE_NAME}”")
    expect(page.locator("img[src=x]")).to_have_count(0)
    if with_script:
        assert page.evaluate("window.hit") is None
        assert HOSTILE_NAME in page.title()


def test_the_server_comes_and_goes(folder: Path, sample_repository: Path, make_page: MakePage, tmp_path: Path) -> None:
    """The page waits for it, is ready by itself, says that it is gone, and that it is itself gone."""
    ports = some_ports()
    with site(folder, f"127.0.0.1:{ports.grpc}", tmp_path) as running:
        page = make_page(running.address)
        notice = page.locator(".notice")
        expect(notice).to_contain_text("Waiting for the model server")
        health = running.ask("/healthz")
        assert health.status == 503
        assert health.json["ready"] is False
        search(page, "墨镜")
        expect(notice).to_contain_text("no server answers", timeout=15_000)
        with ports.serve(sample_repository):
            expect(first_name(page)).to_be_visible(timeout=30_000)  # what was asked is answered
            assert running.ask("/healthz").json["ready"] is True
        page.click("text=时钟")
        expect(page.get_by_role("alert")).to_contain_text("The model server does not answer", timeout=15_000)
        assert running.ask("/healthz").json["reason"] == "the model server is not ready"
        page.goto(f"{running.address}/?similar=0")
        expect(first_name(page)).to_be_visible()  # its vector is here
        assert running.stop() == 0
        assert running.log.count("no server answers") == 1  # tried many times, told once
        page.click("text=时钟")
        expect(page.get_by_role("alert")).to_contain_text("The search page's own server does not answer")

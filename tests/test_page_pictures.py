"""Pictures on the page at /, in a real browser and with a model that names their colours."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from test_page_browser import ask, browser, complaints, find, last_answer, pytestmark, started, text, wait_for
from vl_trained import COLOURS, trained

__all__ = ["browser", "pytestmark"]
SHOTS = os.environ.get("PAGODA_SCREENSHOTS")
"""A folder for pictures of the page, for who wants to look at them."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started(trained(), "--device", "reference") as (base, _):
        yield base


@pytest.fixture
def page(browser: WebDriver, url: str) -> WebDriver:
    browser.set_window_size(1200, 800)
    browser.get(url)
    browser.execute_script("localStorage.clear(); localStorage.setItem('pagoda.language', 'en')")
    browser.get(url)
    browser.get_log("browser")
    wait_for(lambda: find(browser, "picture").is_displayed())
    browser.execute_script("document.getElementById('temperature').value = '0'")
    return browser


def saved(folder: Path, colour: str) -> str:
    path = folder / f"{colour}.png"
    Image.new("RGB", (112, 84), COLOURS[colour]).save(path)
    return str(path)


def attach(page: WebDriver, *paths: str) -> None:
    find(page, "file").send_keys("\n".join(paths))


def thumbnails(page: WebDriver) -> list[str]:
    return [str(each.get_attribute("aria-label")) for each in page.find_elements(By.CSS_SELECTOR, "#pictures button")]


def shoot(page: WebDriver, name: str) -> None:
    if SHOTS:
        page.save_screenshot(f"{SHOTS}/{name}.png")


def answered(page: WebDriver) -> str:
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, ".turn.assistant .speed"), 60)
    return last_answer(page).strip()


def test_a_picture_is_shown_and_its_colour_named(page: WebDriver, tmp_path: Path) -> None:
    attach(page, saved(tmp_path, "red"))
    wait_for(lambda: thumbnails(page))
    shoot(page, "attached")
    ask(page, "What colour is this?")
    assert answered(page) == "red"
    shown = page.find_element(By.CSS_SELECTOR, ".turn.user img")
    assert shown.size["width"] == 112 and shown.get_attribute("alt") == "Picture"
    assert thumbnails(page) == []
    shoot(page, "answered")
    page.refresh()
    assert page.find_elements(By.CSS_SELECTOR, ".turn.user img"), "pictures outlive a reload"
    assert complaints(page) == []


def test_pictures_are_removed_by_mouse_and_keyboard_and_come_back_to_be_edited(page: WebDriver, tmp_path: Path) -> None:
    attach(page, saved(tmp_path, "red"), saved(tmp_path, "blue"), saved(tmp_path, "green"))
    wait_for(lambda: len(thumbnails(page)) == 3)
    assert thumbnails(page)[0] == "Remove this picture"
    page.find_elements(By.CSS_SELECTOR, "#pictures button")[0].click()
    assert len(thumbnails(page)) == 2
    page.find_elements(By.CSS_SELECTOR, "#pictures button")[1].send_keys(Keys.ENTER)
    assert len(thumbnails(page)) == 1
    ask(page, "What colour is this?")
    assert answered(page) == "blue"
    page.find_element(By.CSS_SELECTOR, ".turn.user .tools button").click()
    assert len(thumbnails(page)) == 1 and find(page, "text").get_attribute("value") == "What colour is this?"


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page: WebDriver, tmp_path: Path, how: str) -> None:
    data = base64.b64encode(Path(saved(tmp_path, "green")).read_bytes()).decode()
    page.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)), held = new DataTransfer();
        held.items.add(new File([bytes], "a.png", {type: "image/png"}));
        held.items.add(new File(["x"], "a.txt", {type: "text/plain"}));
        document.body.dispatchEvent(arguments[1] === "paste"
          ? new ClipboardEvent("paste", {clipboardData: held, bubbles: true})
          : new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true}));
        """,
        data,
        how,
    )
    wait_for(lambda: thumbnails(page))
    assert len(thumbnails(page)) == 1
    find(page, "text").send_keys(Keys.ENTER)  # a picture without words
    assert answered(page) == "green"


def test_on_a_phone_and_in_chinese(page: WebDriver, tmp_path: Path) -> None:
    page.set_window_size(390, 780)
    find(page, "lang").click()
    attach(page, *(saved(tmp_path, colour) for colour in COLOURS))
    wait_for(lambda: len(thumbnails(page)) == len(COLOURS))
    assert set(thumbnails(page)) == {"移除这张图片"}
    width = page.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert width <= 0, "nothing sticks out"
    shoot(page, "phone")
    for _ in COLOURS:
        page.find_element(By.CSS_SELECTOR, "#pictures button").click()
    attach(page, saved(tmp_path, "blue"))
    wait_for(lambda: thumbnails(page))
    ask(page, "What colour is this?")
    assert answered(page) == "blue"
    shoot(page, "phone-answered")


def test_large_photos_go_smaller(page: WebDriver, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.effect_noise((2600, 1300), 90).convert("RGB").save(path)
    assert path.stat().st_size > 1_500_000
    attach(page, str(path))
    wait_for(lambda: thumbnails(page))
    url = str(page.execute_script("return pictures[0]"))
    assert url.startswith("data:image/jpeg;base64,") and len(url) < path.stat().st_size
    size = page.execute_async_script(
        "const i = new Image(), done = arguments[1]; i.onload = () => done([i.width, i.height]); i.src = arguments[0];",
        url,
    )
    assert size == [2048, 1024]


def test_what_is_no_picture_is_told(page: WebDriver, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"not a picture")
    attach(page, str(path))
    wait_for(lambda: thumbnails(page))
    ask(page, "What is this?")
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, ".turn.error"), 60)
    assert "no picture that can be read here" in text(page, "log")

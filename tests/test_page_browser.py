"""The page at / in a real browser (headless Chromium), on the real server with the small model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pooled_models import minilm_folder

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt install chromium chromium-driver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
KEY = "sesame"


@pytest.fixture(scope="module")
def url(smollm2_path: str) -> Iterator[str]:
    with started(smollm2_path, "--max-model-len", "2048", "--api-key", KEY) as (base, _):
        yield base


@contextmanager
def started(model: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "pagoda.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "small", "--port", str(port), *options]
    process = subprocess.Popen(command, env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}/"
    try:
        wait_for(lambda: answers(base + "health"), 60)
        yield base, process
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    for flag in FLAGS:
        options.add_argument(flag)
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def page(browser: WebDriver, url: str) -> WebDriver:
    """Opened anew, in English, with the key typed in and no conversation."""
    browser.get(url)
    browser.execute_script("localStorage.clear(); localStorage.setItem('pagoda.language', 'en')")
    browser.get(url)
    browser.get_log("browser")
    wait_for(lambda: "API key" in text(browser, "state"))
    find(browser, "key").send_keys(KEY + Keys.TAB)
    wait_for(lambda: text(browser, "state") == "ready")
    find(browser, "settingsButton").click()
    return browser


def find(page: WebDriver, name: str):  # type: ignore[no-untyped-def]
    return page.find_element(By.ID, name)


def text(page: WebDriver, name: str) -> str:
    return str(find(page, name).text)


def last_answer(page: WebDriver) -> str:
    found = page.find_elements(By.CSS_SELECTOR, ".turn.assistant .body")
    return found[-1].text if found else ""


def ask(page: WebDriver, words: str) -> None:
    find(page, "text").send_keys(words + Keys.ENTER)


def complaints(page: WebDriver) -> list[str]:
    """What the browser found wrong; that a key is asked for until it is typed is as it should be."""
    entries = [each["message"] for each in page.get_log("browser") if each["level"] in ("SEVERE", "WARNING")]
    return [message for message in entries if "401" not in message]


def answer_for_long(page: WebDriver) -> None:
    set_value(page, "maxTokens", "1500")
    page.execute_script("const own = parameters; parameters = () => ({...own(), ignore_eos: true})")


def set_value(page: WebDriver, name: str, value: str) -> None:
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.onchange?.()", name, value
    )


def test_a_chat_streams_and_is_kept_over_a_reload(page: WebDriver) -> None:
    set_value(page, "temperature", "0")
    set_value(page, "maxTokens", "24")
    ask(page, "What is a pagoda? One sentence.")
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, ".turn.assistant .speed"))
    first = last_answer(page)
    assert len(first) > 20 and "first token" in page.find_element(By.CSS_SELECTOR, ".speed").text
    page.refresh()
    assert last_answer(page) == first
    set_value(page, "key", KEY)
    wait_for(lambda: text(page, "state") == "ready")
    buttons = page.find_elements(By.CSS_SELECTOR, ".turn.assistant .tools button")
    next(each for each in buttons if each.text == "Again").click()
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, ".turn.assistant .speed"))
    assert last_answer(page) == first
    find(page, "new").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".turn") and find(page, "empty").is_displayed()
    assert not complaints(page)


def test_an_answer_is_stopped_by_escape(page: WebDriver) -> None:
    answer_for_long(page)
    ask(page, "Count from one to one thousand, in words.")
    wait_for(lambda: len(last_answer(page)) > 20)
    assert find(page, "send").text == "Stop"
    find(page, "text").send_keys(Keys.ESCAPE)
    wait_for(lambda: find(page, "send").text == "Send")
    kept = last_answer(page)
    time.sleep(0.3)
    assert kept and last_answer(page) == kept


def test_an_error_of_the_server_is_shown(page: WebDriver) -> None:
    set_value(page, "temperature", "-3")
    ask(page, "Hello")
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, ".turn.error"))
    assert "temperature" in last_answer(page)


def test_live_figures_and_facts(page: WebDriver) -> None:
    find(page, "liveButton").click()
    answer_for_long(page)
    ask(page, "Tell me a long story about the sea.")
    wait_for(lambda: float(text(page, "plot-rate").splitlines()[-1]) > 0)
    find(page, "text").send_keys(Keys.ESCAPE)
    assert "small" in text(page, "facts") and "2,048" in text(page, "facts")
    assert "/v1/chat/completions" in text(page, "curl")
    assert not complaints(page)


def test_two_languages_two_themes_and_a_phone(page: WebDriver) -> None:
    find(page, "lang").click()
    assert (find(page, "send").text, page.find_element(By.TAG_NAME, "html").get_attribute("lang")) == ("发送", "zh")
    before = find(page, "chat").value_of_css_property("color")
    find(page, "theme").click()
    assert find(page, "chat").value_of_css_property("color") != before
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for panel in ("settingsButton", "liveButton"):
            find(page, panel).click()
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360 and find(page, "send").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


MARKDOWN = {
    "a **b** `c`": "<p>a <strong>b</strong> <code>c</code></p>",
    "# T #\ntext": "<h1>T</h1><p>text</p>",
    "- a\n- b\n  1. c": "<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>",
    "3. a\n\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> q": "<blockquote><p>q</p></blockquote>",
    "|a|\n|-|\n|1|": '<div class="table"><table><tr><th>a</th></tr><tr><td>1</td></tr></table></div>',
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "2 * 3 * 4 and snake_case_name": "<p>2 * 3 * 4 and snake_case_name</p>",
}


def test_markdown_becomes_nodes_and_never_markup(page: WebDriver) -> None:
    show = "const box = make('div'); render(box, arguments[0]); return box.innerHTML"
    for source, expected in MARKDOWN.items():
        assert page.execute_script(show, source) == expected
    code = "1. a\n   ```python\n   x = 1\n   ```\n2. b\n```\n<b>\n```"
    assert page.execute_script(show, code).count('class="code"') == 2
    grown = (
        "const box = make('div'); for (let n = 1; n <= arguments[0].length; n++) render(box, arguments[0].slice(0, n));"
    )
    whole = "\n\n".join([*MARKDOWN, code])
    assert page.execute_script(grown + " return box.innerHTML", whole) == page.execute_script(show, whole)


def test_a_server_that_is_killed_in_the_middle_of_an_answer(browser: WebDriver, smollm2_path: str) -> None:
    with started(smollm2_path, "--max-model-len", "2048", "--num-gpu-blocks-override", "256") as (base, process):
        browser.get(base)
        browser.execute_script("localStorage.clear(); localStorage.setItem('pagoda.language', 'en')")
        browser.get(base)
        wait_for(lambda: text(browser, "state") == "ready")
        answer_for_long(browser)
        ask(browser, "Count from one to one thousand, in words.")
        wait_for(lambda: len(last_answer(browser)) > 20)
        process.kill()
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, ".turn .failed"))
        kept, _, said = last_answer(browser).rpartition("\n")
        assert len(kept) > 20 and said == "The connection to the server was lost before the answer was complete."
        wait_for(lambda: text(browser, "state") == "not reachable")
        assert find(browser, "send").text == "Send"


def test_a_phone_shows_one_panel_and_a_model_that_makes_vectors_its_call(browser: WebDriver) -> None:
    size = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    with started(str(minilm_folder())) as (base, _):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            browser.get(base)
            wait_for(lambda: "answers no chats" in text(browser, "greeting"))
            assert not find(browser, "form").is_displayed()
            find(browser, "settingsButton").send_keys(Keys.ENTER)
            assert find(browser, "settings").is_displayed()
            find(browser, "liveButton").send_keys(Keys.ENTER)
            assert find(browser, "live").is_displayed() and not find(browser, "settings").is_displayed()
            assert "/v1/embeddings" in str(find(browser, "curl").get_attribute("textContent"))
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_programs_get_json(url: str) -> None:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {KEY}"})
    assert json.loads(urllib.request.urlopen(request).read())["name"] == "pagoda"

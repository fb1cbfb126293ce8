"""export.py --page in Chromium: texts, controls, layout, and no network requests."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import GPT2, REFERENCE, ROOT

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
PROMPTS = json.loads((REFERENCE / "expected.json").read_text())
expect = playwright.expect


# Subprocesses, since a fork of this process would keep Playwright's pipe open for ever.
def export_page(folder: Path, model: Path, *options: str) -> Path:
    command = [sys.executable, ROOT / "export.py", model, "--page", "-o", folder / "story.html"]
    subprocess.run([*command, *options], check=True)
    return folder / "story.html"


def export_page_folder(folder: Path) -> subprocess.CompletedProcess:
    code = "import command_line as c, export; export.MAX_PAGE_BYTES = 1000; c.run(export.main)"
    command = [sys.executable, "-c", code, REFERENCE, "--page", "-o", folder]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run_text(*words: str | Path, stdin: str = "") -> str:
    command = [sys.executable, ROOT / "run.py", *words]
    options = {"check": True, "capture_output": True, "input": stdin.encode()}
    out = subprocess.run(command, **options).stdout.decode()
    return out.removesuffix("\n")


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    return export_page(tmp_path_factory.mktemp("page"), REFERENCE)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, story):
    page = browser.new_page()
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text))
    page.goto(story.as_uri())
    expect(status(page)).to_have_text("Ready")
    yield page
    page.close()


def status(page):
    return page.locator("#status")  # by id: the text has the role status, too


def write(page, prompt: str | None = None, **fields) -> str:
    """Fills the form, presses Write and returns the text."""
    names = {"top_k": "Top-k", "top_p": "Top-p"}
    if prompt is not None:
        page.get_by_label("Prompt").fill(prompt)
    for name, value in fields.items():
        page.get_by_label(names.get(name, name.capitalize()), exact=True).fill(str(value))
    page.get_by_role("button", name="Write").click()
    return wait_for_text(page)


def wait_for_text(page) -> str:
    expect(status(page)).to_contain_text("Written at", timeout=60_000)
    return page.get_by_label("Text", exact=True).text_content()


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt["prompt"][:8])
def test_greedy_texts_are_gpt_burns(page, prompt):
    assert write(page, prompt["prompt"], tokens=200, temperature=0) == prompt["greedy"]


def test_a_seed_gives_the_text_of_run_py(page):
    words = ["-p", "The ", "-n", "150", "--top-k", "20", "--top-p", "0.9", "-s", "5"]
    expected = run_text(REFERENCE, *words)
    assert write(page, "The ", tokens=150, top_k=20, top_p=0.9, seed=5) == expected


def test_an_empty_prompt_is_a_line_break(page):
    assert write(page, "", tokens=30) == run_text(REFERENCE, "-n", "30")
    expect(page.get_by_label("special tokens")).to_be_hidden()  # the tokenizer has none


def test_go_on_continues_the_same_text(page):
    whole = write(page, "The ", tokens=100, seed=3)
    assert write(page, "The ", tokens=50, seed=3) == whole[: len("The ") + 50]
    page.get_by_role("button", name="Go on").click()
    assert wait_for_text(page) == whole


def test_stop_is_visible_during_generation_and_ends_it(page):
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_hidden()
    page.get_by_label("Tokens", exact=True).fill("1000000")
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_label("Text", exact=True)).to_have_attribute("aria-busy", "true")
    expect(page.get_by_text("tokens per second")).to_be_visible()
    stop.click()
    assert 1 < len(wait_for_text(page)) < 1_000_000
    expect(stop).to_be_hidden()


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.press("Tab")
    page.keyboard.type("The ")
    for value in ("20", "0"):
        page.keyboard.press("Tab")
        page.keyboard.type(value)
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.press("Control+Enter")
    assert wait_for_text(page) == PROMPTS[1]["greedy"][: len("The ") + 20]
    assert page.evaluate("document.activeElement.textContent") in ("", "Go on")


def test_the_page_makes_no_network_requests(page):
    write(page, "The ", tokens=10)
    assert {url.split(":")[0] for url in page.requests} == {"file", "blob"}
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert "default-src 'none'" in policy
    assert not any(word in policy for word in ("connect-src", "http", "*", "unsafe-inline"))
    fetched = "fetch('http://127.0.0.1:9').then(() => true, () => false)"
    assert page.errors == []
    assert page.evaluate(fetched) is False
    assert "Content Security Policy" in page.errors[0]


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window_in_light_and_dark(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    write(page, "x" * 300, tokens=300)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    red = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
    assert red < 64 if scheme == "dark" else red > 192


def test_the_page_scrolls_with_the_text_unless_the_user_scrolled_away(page):
    page.set_viewport_size({"width": 360, "height": 700})
    write(page, "The ", tokens=600, seed=3)
    assert page.evaluate("scrollY > 0 && scrollY + innerHeight >= document.body.scrollHeight - 1")
    page.evaluate("scrollTo(0, 0)")
    page.get_by_role("button", name="Go on").press("Enter")
    wait_for_text(page)
    assert page.evaluate("scrollY") == 0


def test_unknown_characters_are_a_warning(page):
    assert write(page, "日The\ufeff 日 \t", tokens=5).startswith("日The")
    warning = "44.4 % of the prompt is not in the model's vocabulary: 日 U+0009 U+FEFF"
    expect(page.get_by_text(warning)).to_be_visible()


def test_an_invalid_field_prevents_generation(page):
    page.get_by_label("Tokens", exact=True).fill("0")
    page.get_by_role("button", name="Write").click()
    assert page.evaluate("document.querySelector(':invalid:not(form)').id") == "tokens"
    expect(status(page)).to_have_text("Ready")


def test_copy_takes_the_whole_text(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = write(page, "The ", tokens=20)
    page.get_by_role("button", name="Copy").click()
    expect(status(page)).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_without_simd_the_page_says_so(browser, story):
    page = browser.new_page()
    page.add_init_script("WebAssembly.validate = () => false")
    page.goto(story.as_uri())
    expect(status(page)).to_contain_text("lacks WebAssembly's SIMD")
    expect(page.get_by_role("button", name="Write")).to_be_disabled()
    page.close()


def test_the_page_of_a_small_model_is_small(story):
    assert story.stat().st_size <= 450_000


def test_a_gpt2_in_int8_gives_the_texts_of_run_py(browser, tmp_path):
    pytest.importorskip("tiktoken")
    page = browser.new_page()
    page.goto(export_page(tmp_path, GPT2, "--weights", "int8").as_uri())
    prompts = ["It's 2 o'clock", "The<|endoftext|>", "<|endoftext|>"]
    words = ["-i", "-n", "70", "--temperature", "0", "--weights", "int8"]
    expected = run_text(GPT2, *words, stdin="\n".join(prompts))
    expect(page.get_by_placeholder("or nothing")).to_be_visible()
    texts = [write(page, text, tokens=70, temperature=0).removeprefix(text) for text in prompts]
    assert "\n".join(texts) == expected
    assert write(page, "") == texts[-1]
    page.get_by_label("special tokens").check()
    words = ["-p", prompts[1], "--no-special", *words[1:]]
    text = write(page, prompts[1])
    assert run_text(GPT2, *words).startswith(text)  # less an incomplete character
    assert text.removeprefix(prompts[1]) != texts[1]
    page.close()


def test_a_large_model_is_a_folder_with_streamed_weights(browser, tmp_path):
    folder = tmp_path / "story"
    assert export_page_folder(folder).returncode == 0
    assert sorted(os.listdir(folder)) == ["index.html", "model.bin"]
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    expect(status(page)).to_contain_text("python -m http.server")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            assert write(page, "The ", tokens=200, temperature=0) == PROMPTS[1]["greedy"]
            model = (folder / "model.bin").read_bytes()
            (folder / "model.bin").write_bytes(model[:-64])
            page.close()
            page = browser.new_page()  # with an empty cache
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            expect(status(page)).to_contain_text("the weights are not complete")
        finally:
            server.shutdown()
    page.close()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("someone's")
    result = export_page_folder(tmp_path)
    assert result.returncode == 1
    assert "is no page of ours" in result.stderr
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.skipif("GPT_TINY_PICTURE" not in os.environ, reason="GPT_TINY_PICTURE is not set")
def test_the_picture_in_the_readme(page):
    page.set_viewport_size({"width": 1200, "height": 760})
    write(page, "The function ", tokens=465, temperature=0.6, seed=3)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=os.environ["GPT_TINY_PICTURE"])

"""The worker for exported programs, and for pages in Chromium; bench.py starts it."""

import functools
import http.server
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from worker import peak_memory, serve

import export
from gpt_tiny import GPTConfig, initial_weights
from models import checkpoint
from tokenizers import CharTokenizer


def prepare(kind: str, n: int, model: str = "", config: dict | None = None, stored: str = ""):
    """`kind`: "program" is a whole process, "tokens" a program after its start, "page" a page. The
    model is a folder's or, with a config, made up in the type `stored`."""
    folder = tempfile.TemporaryDirectory()
    if config:
        config, model = GPTConfig(**config), f"{folder.name}/model"
        arrays = {name: x.astype(stored) for name, x in initial_weights(config, 0).items()}
        sizes = {name: size for name, size in asdict(config).items() if name != "gpt2"}
        checkpoint.save(Path(model), {"model": sizes}, arrays, CharTokenizer())
    output = Path(folder.name, "story.html")
    sys.argv = ["export.py", model, "-o", str(output), *(["--page"] if kind == "page" else [])]
    export.main()
    page = open_page(output, n) if kind == "page" else None
    command = [output, "-n", str(n), "--temperature", "0"]

    def work() -> float:
        if page:
            page.get_by_role("button", name="Write").click()
            page.get_by_text("Written at").wait_for(timeout=600_000)
            return n / float(page.locator("#status").text_content().split()[2])
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            if kind == "tokens":
                process.stdout.read(2)  # the prompt, a line break, and the first token
                start = time.perf_counter()
            process.stdout.read()
        return time.perf_counter() - start

    work.folder = folder  # kept as long as the work
    return work, {}


def open_page(output: Path, n: int):
    """The page, ready to write n tokens; a large model's folder comes from a server."""
    from playwright.sync_api import sync_playwright

    address = output.as_uri()
    if not output.exists():
        files = http.server.SimpleHTTPRequestHandler
        handler = functools.partial(files, directory=output.with_suffix(""))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
    chromium = sync_playwright().start().chromium
    path = shutil.which("chromium") or shutil.which("google-chrome")
    page = chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
    page.goto(address)
    page.get_by_text("Ready").wait_for(timeout=600_000)
    page.get_by_label("Tokens", exact=True).fill(str(n))
    page.get_by_label("Temperature").fill("0")
    return page


if __name__ == "__main__":
    serve(prepare, lambda: peak_memory(resource.RUSAGE_CHILDREN))

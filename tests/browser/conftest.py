"A real JupyterLab and a real chromium. Without chromium the tests are skipped; where it is required (CI) they fail."
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
# screenshots of every widget, and of failures
SHOTS = Path(os.environ.get("COPD_SHOTS", ROOT / "reports_out" / "browser"))
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def required() -> bool: return bool(os.environ.get("CI")) or os.environ.get("COPD_REQUIRE_BROWSER") == "1"


def use_theme(page, name: str):
    "Switch a JupyterLab to its theme Light or Dark."
    page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
    page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{str(name == 'Light').lower()}'")
    page.wait_for_timeout(500)


def brightness(element) -> float:
    "Mean of what an element shows, 0 for black and 255 for white."
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("L")).mean()


def missing(what: str):
    "Skip where a browser is optional, fail where it is required."
    message = f"{what}: `make setup` installs it where it may (apt-get install chromium)"
    pytest.fail(message) if required() else pytest.skip(message)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    "Let fixtures know how their test ended."
    report = (yield).get_result()
    setattr(item, f"report_{report.when}", report)


@pytest.fixture(scope="session")
def chromium():
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None: missing("chromium is not installed")
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing("playwright is not installed")
    with sync_playwright() as play:
        quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"]
        browser = play.chromium.launch(executable_path=program, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, request):
    "Opens pages that may reach this machine only; records other requests, and takes a screenshot if the test fails."
    SHOTS.mkdir(parents=True, exist_ok=True)
    pages = []

    def opened(width=1280, height=900, scale=1, scheme="light"):
        context = chromium.new_context(viewport=dict(width=width, height=height), device_scale_factor=scale,
                                       color_scheme=scheme)
        page = context.new_page()
        page.elsewhere = []

        def judge(route):
            if re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|(file|data|blob|about):", route.request.url):
                return route.continue_()
            page.elsewhere.append(route.request.url)
            route.abort()
        page.route("**/*", judge)
        page.set_default_timeout(120_000)
        pages.append(page)
        return page
    yield opened
    failed = getattr(request.node, "report_call", None) is None or request.node.report_call.failed
    for i, page in enumerate(pages):
        if failed: page.screenshot(path=SHOTS / f"failed-{request.node.name}-{i}.png", full_page=True)
        page.context.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


SETTINGS = {"apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True),
            "notebook-extension/tracker": dict(windowingMode="none", recordTiming=False)}


@dataclass
class Lab:
    url: str
    token: str
    folder: Path  # where notebooks are served from

    def open(self, page, notebook: str):
        "Open a notebook and wait for its kernel."
        page.goto(f"{self.url}/lab/tree/{notebook}?token={self.token}&reset")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status "
                               "=== 'idle'")
        return page

    def run_all(self, page):
        "Run all cells, and wait until the kernel has done so; an error in any of them is an error here."
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === "
                               "'idle'")
        errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
        assert not errors, errors[0][-2000:]


@pytest.fixture(scope="session")
def lab(tmp_path_factory, chromium):
    "JupyterLab on 127.0.0.1 with a token and folders of its own, serving copies of the tutorials."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs" / "tutorials", home / "work")
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    token, port = secrets.token_hex(16), free_port()
    places = dict(HOME=home, JUPYTER_CONFIG_DIR=home / "config", JUPYTER_DATA_DIR=home / "data",
                  JUPYTER_RUNTIME_DIR=home / "runtime", IPYTHONDIR=home / "ipython",
                  JUPYTERLAB_SETTINGS_DIR=home / "settings", JUPYTERLAB_WORKSPACES_DIR=home / "workspaces")
    environment = os.environ | {k: str(v) for k, v in places.items()} | dict(
        PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false", PYDEVD_DISABLE_FILE_VALIDATION="1")
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             f"--IdentityProvider.token={token}",
             f"--ServerApp.root_dir={home / 'work'}", "--ServerApp.port_retries=0",
             "--LabApp.expose_app_in_browser=True"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _when_up(Lab(f"http://127.0.0.1:{port}", token, home / "work"), server, home / "log")
    finally:
        server.terminate()
        server.wait(20)


def _when_up(lab: Lab, server: subprocess.Popen, log: Path) -> Lab:
    "Wait until the server answers."
    end = time.monotonic() + 180
    while time.monotonic() < end and server.poll() is None:
        try: return lab if urlopen(f"{lab.url}/api/status?token={lab.token}", timeout=5).status == 200 else lab
        except OSError: time.sleep(0.3)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()[-3000:]}")

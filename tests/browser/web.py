"""A browser that keeps what a page did, and servers on free ports, for tests of what readers see.

Nothing here leaves the machine: the browser resolves no name, so whatever a page asks of another
host fails, and `Browser.outside()` lists what was asked.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]

FLAGS = (
    "--headless",
    "--no-sandbox",  # needed by root, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
LOOPBACK = "127.0.0.1"


def find_chromium():
    """Paths of the browser and of its driver, or None where one of them is missing."""
    browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, browsers)), None)
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """Chromium, headless; `driver` is selenium's, the rest is what these tests ask of it."""

    def __init__(self, profile):
        browser, driver = find_chromium()
        options = Options()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("unhandledPromptBehavior", "accept")  # a page with unsaved work
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self._messages, self._requests = [], []

    def open(self, url):
        """Opens a page, and forgets what earlier pages said and asked for."""
        self.driver.get("about:blank")
        self._collect()
        self._messages, self._requests = [], []
        self.driver.get(url)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script, *arguments):
        """The value that JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=30, what="the page"):
        """The first true value of `condition(browser)`; asked again and again until then."""
        from selenium.common.exceptions import StaleElementReferenceException as Stale

        waiting = WebDriverWait(self, seconds, poll_frequency=0.2, ignored_exceptions=[Stale])
        return waiting.until(condition, f"waited {seconds} s for {what}")

    def wait_for(self, selector, seconds=30):
        """The first element that matches, once there is one."""
        return self.wait(lambda page: next(iter(page.find_all(selector)), None), seconds, selector)

    def errors(self):
        """Errors on the console since the page was opened."""
        self._collect()
        return [m["message"] for m in self._messages if m["level"] == "SEVERE"]

    def outside(self):
        """Everything asked of another host since the page was opened."""
        self._collect()
        return [url for url in self._requests if _is_outside(url)]

    def colour_scheme(self, scheme):
        """Pretends that the reader prefers "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def screenshot(self, path, *, height=None):
        """The window as a picture, or a page of that many pixels."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if height:
            self.driver.set_window_size(1400, height)
            time.sleep(0.5)
        self.driver.save_screenshot(str(path))
        if height:
            self.driver.set_window_size(1400, 1000)

    def close(self):
        self.driver.quit()

    def _collect(self):
        self._messages += self.driver.get_log("browser")
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                self._requests.append(event["params"]["request"]["url"])
            elif event["method"] == "Network.webSocketCreated":
                self._requests.append(event["params"]["url"])


def _is_outside(url):
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != LOOPBACK


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve_folder(folder):
    """A folder as a web site; gives its address."""
    server = ThreadingHTTPServer((LOOPBACK, 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def free_port():
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def start_server(arguments, ready, *, home, cwd=None, seconds=120):
    """Runs a Python module as a server until the block ends.

    Args:
        arguments: after `python -m`.
        ready: the address that answers once the server is up.
        home: an empty folder for its settings and log, and for the figures that notebooks draw.
        cwd: the folder it runs in.
        seconds: how long to wait for it.
    """
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "PAPERLIB_FIGURES": str(home / "figures"),
    }
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_it_answers(ready, server, home / "log", seconds)
            yield
        finally:
            server.terminate()  # Jupyter ends its kernels first
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_it_answers(url, server, log, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(url, timeout=5):
                return
        time.sleep(0.3)
    raise RuntimeError(f"the server did not answer at {url}\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def start_lab(folder, home):
    """JupyterLab on a folder; gives a function from a path in it to the address that opens it.

    The page has `window.jupyterapp`, through which a test can ask what the notebook holds: cells
    out of sight are not part of the page.
    """
    port, token = free_port(), secrets.token_hex(16)
    address = f"http://{LOOPBACK}:{port}"
    arguments = (
        *("jupyterlab", "--no-browser", "--allow-root", f"--ip={LOOPBACK}", f"--port={port}"),
        *(f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"),
        *("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",),
        *("--LabApp.news_url=None", "--LabApp.extension_manager=readonly"),
    )
    with start_server(arguments, f"{address}/api?token={token}", home=home, cwd=folder):
        yield lambda path: f"{address}/lab/tree/{path}?reset&token={token}"


@contextlib.contextmanager
def start_voila(notebook, home):
    """A notebook as a web page by Voila; gives its address."""
    port = free_port()
    address = f"http://{LOOPBACK}:{port}/"
    arguments = (
        *("voila", str(notebook), "--no-browser", f"--Voila.ip={LOOPBACK}", f"--port={port}"),
        *("--show_tracebacks=True", "--Voila.port_retries=0"),
    )
    # Its own page would start a kernel; a file of its style only shows that it is up.
    ready = f"{address}voila/static/voila.js"
    with start_server(arguments, ready, home=home, cwd=Path(notebook).parent):
        yield address

"""A headless Chromium, driven over its DevTools protocol; see `find`."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request


def find():
    """The path of a Chromium or Chrome; None where there is none."""
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    """The one page of a browser. Errors of its scripts are kept in `errors`."""

    def __init__(self, socket):
        self._socket, self._ids, self.errors = socket, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **arguments):
        """The result of a command."""
        number = next(self._ids)
        self._socket.send(json.dumps(dict(id=number, method=method, params=arguments)))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            event, told = message.get("method"), message.get("params", {})
            failed = event == "Log.entryAdded" and told["entry"]["level"] == "error"
            if failed or event == "Runtime.exceptionThrown":
                self.errors.append(told)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def size(self, width, height):
        """Sets the size of the window in pixels."""
        how = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **how)

    def value(self, script):
        """The value of an expression in the page; of a promise, what it becomes."""
        how = dict(expression=script, returnByValue=True, awaitPromise=True)
        result = self.call("Runtime.evaluate", **how)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script, seconds=60):
        """Waits until an expression is true; returns it."""
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"{script} is still {value!r}"
            time.sleep(0.05)
        return value

    def text(self, name):
        """The text of the element with this id."""
        return self.value(f"document.getElementById({name!r}).textContent")

    def click(self, name):
        self.value(f"document.getElementById({name!r}).click()")

    def type(self, name, text):
        """Replaces the text of an input as a user does."""
        self.value(f"document.getElementById({name!r}).select()")
        self.value(f"document.getElementById({name!r}).focus()")
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened(url, folder):
    """A `Page` at an address, in a browser of its own, whose files are in `folder`."""
    from websockets.sync.client import connect

    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += ["--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={folder}", url]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Any proxy of the environment is not for this machine's own pages.
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    process = subprocess.Popen([find(), *arguments], env=env, **silent)
    try:
        port = _port(folder / "DevToolsActivePort", process)
        with connect(_target(port), max_size=None, proxy=None) as socket:
            page = Page(socket)
            page.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")
            yield page
    finally:
        process.terminate()
        process.wait(timeout=30)


def _port(file, process):
    """The port of the DevTools protocol, which the browser writes when it is ready."""
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()):
        assert process.poll() is None, "the browser has ended"
        assert time.monotonic() < end, "the browser does not start"
        time.sleep(0.05)
    return file.read_text().split()[0]


def _target(port):
    """The address of the page's websocket."""
    end = time.monotonic() + 60
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        with opener.open(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            pages = [t for t in json.load(answer) if t["type"] == "page"]
        if pages:
            return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise AssertionError("the browser has no page")

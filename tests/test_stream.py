"""The page of a stream: in a real browser, from the command to a download; refusals."""

import contextlib
import io
import os
import subprocess
import sys
import types
import urllib.request

import browser
import numpy as np
import programs
import pytest
import toys
from PIL import Image

from dmd_jax import stream, weights
from dmd_jax.data import moving_digits, word_vectors
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.wan import Wan, WanConfig

CAUSAL = dict(frames_per_block=2, first_alone=True, window=4, sink=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a tiny causal student of moving digits that learnt nothing."""
    channels = moving_digits.FOLD**2
    config = WanConfig(16, 16, 2, 1, channels, channels, word_vectors.DIM)
    path = tmp_path_factory.mktemp("digits") / "student.safetensors"
    net = toys.weights(lambda rngs: Wan(config, rngs=rngs), 0)
    notes = {"data": "moving_digits", "times": (1.0, 0.5), "shift": 1.0, "causal": CAUSAL}
    weights.save(path, Denoiser(net), **notes)
    return path


@contextlib.contextmanager
def served(student, *arguments):
    """The address of the page of a started command."""
    command = [sys.executable, "-m", "dmd_jax.stream", f"--checkpoint={student}", "--port=0"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=programs.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_a_page_plays_takes_a_prompt_and_gives_the_video(student, tmp_path):
    with served(student) as address, browser.opened(address, tmp_path) as page:
        page.wait("state === 'ready'", seconds=180)
        assert page.text("title") == "student" and page.text("send") == "Play"
        assert "blocks of 2 frames in 2 steps, window of 4" in page.text("message")

        page.type("prompt", "three moves left")
        page.click("send")
        page.wait("shown > 8")
        assert page.text("caption") == "three moves left"
        assert page.text("send") == "Change prompt"
        count, *pixels = page.value("[shown, ...screen2d.getImageData(0, 0, 20, 20).data]")
        seen = np.reshape(pixels, (20, 20, 4))[..., :3]

        page.type("prompt", "seven moves up")
        page.click("send")
        page.wait("document.getElementById('receipt').dataset.kind === 'applied'")
        assert page.text("receipt").startswith("applied at block ")
        page.wait("document.getElementById('caption').textContent === 'seven moves up'")
        page.type("prompt", "one two three four five six seven eight nine")
        page.click("send")
        page.wait("document.getElementById('receipt').dataset.kind === 'refused'")
        assert "has more than 8 words" in page.text("receipt") and page.value("playing")
        for name in ("first", "rate", "denoising", "cache", "decoding"):
            assert any(c.isdigit() for c in page.text(name)), name

        page.click("reset")
        page.wait("state === 'ready' && !playing")
        shown = page.value("shown")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with Image.open(io.BytesIO(opener.open(f"{address}/video.gif").read())) as gif:
            assert gif.n_frames == shown and gif.size == (20, 20)
            gif.seek(count - 1)
            played = np.asarray(gif.convert("RGB")).astype(int)
            gif.seek(count)
            after = np.asarray(gif.convert("RGB")).astype(int)
        assert np.abs(played - seen).mean() < 1 < 10 < np.abs(after - seen).mean()
        page.click("send")  # the same prompt would be refused
        page.wait("document.getElementById('receipt').dataset.kind === 'refused' && !playing")

        page.value("video = 99, socket.close(), 0")  # what a server started anew looks like
        page.wait("state === 'closed'")
        page.wait("state === 'ready'")
        page.type("prompt", "three moves left")
        page.click("send")
        page.wait("shown > 2")
        page.click("reset")

        page.size(390, 844)  # a telephone
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert not page.errors


def test_a_student_that_does_not_stream_is_refused(call):
    output = call(stream, "--checkpoint=moving_digits_teacher")
    assert output.startswith("error: ") and "does not say which frames are a block" in output
    images = call(stream, "--checkpoint=mnist_teacher")
    assert "mnist_teacher is a network of images" in images


def test_a_missing_library_is_named(call, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets.sync", None)
    output = call(stream, f"--checkpoint={student}")
    assert "the page needs websockets: pip install 'dmd_jax[stream]'" in output


@pytest.mark.parametrize("host, warned", [("localhost", False), ("0.0.0.0", True)])
def test_a_page_for_others_is_warned_of(call, student, monkeypatch, capsys, host, warned):
    class Site(contextlib.nullcontext):
        socket = types.SimpleNamespace(getsockname=lambda: (host, 1234))

        def __enter__(self):
            return self

        def serve_forever(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(stream.server, "serve", lambda *args, **how: Site())
    monkeypatch.setattr(stream.Player, "start", lambda player: None)
    assert call(stream, f"--checkpoint={student}", f"--host={host}") is None
    printed = capsys.readouterr().out
    assert f"http://{host}:1234" in printed
    assert ("it has no password" in printed) == warned

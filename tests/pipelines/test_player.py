"""The player and its server: bounded ahead, prompts in mid-stream, states, refusals.

The model of most tests is a stand-in that makes grey frames.
"""

import io
import itertools
import json
import struct
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from dmd_jax.pipelines import player as players
from dmd_jax.pipelines.player import Player, encode
from dmd_jax.pipelines.video_stream import Piece, Times
from dmd_jax.rollouts.samplers import CausalFewStep

FPS = 6  # and so many frames may be sent that are not yet shown


class Model:
    """Blocks of two frames [4, 6, 3], of a grey of 10 times the prompt's length plus the seed."""

    sampler = CausalFewStep((1.0,))

    def __init__(self, longest=None):
        self.longest, self.made, self.release = longest, 0, threading.Event()
        self.release.set()

    def warm_up(self):
        return 1.5

    def embed(self, prompt):
        if prompt == "bad":
            raise ValueError("bad is no prompt")
        return len(prompt)

    def start(self, cond, seed, began):
        return Video(self, cond, seed)


class Video:
    first_frame = 0.25

    def __init__(self, model, cond, seed):
        self.model, self.cond, self.seed = model, cond, seed
        self.blocks, self.times = 0, Times()

    @property
    def full(self):
        return self.blocks == self.model.longest

    def switch(self, cond):
        self.cond = cond

    def __next__(self):
        assert self.model.release.wait(10)
        frames = np.full((2, 4, 6, 3), 10 * self.cond + self.seed, np.uint8)
        piece = Piece(frames, self.blocks, Times(0.1, 0.2, 0.3, 2))
        self.times += piece.times
        self.blocks += 1
        self.model.made += 1
        return piece


class Viewer:
    """What a player has told; `wait` for more of it."""

    def __init__(self):
        self.messages = []

    def __call__(self, message):
        self.messages.append(message)

    def told(self, kind):
        return [m for m in self.messages if isinstance(m, dict) and m["type"] == kind]

    def frames(self, video):
        """(numbers, greys) of the frames of a video."""
        sent = [m for m in self.messages if isinstance(m, bytes)]
        sent = [(struct.unpack("<II", m[:8]), m[8:]) for m in sent]
        own = [(number, data) for (of, number), data in sent if of == video]
        greys = [np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0] for _, data in own]
        return [number for number, _ in own], greys

    def states(self):
        return [m["state"] for m in self.told("state")]


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def ready(model, *, fps=FPS):
    """(a Player that has compiled, its Viewer)."""
    player, viewer = Player(lambda: model, fps=fps), Viewer()
    player.attach(viewer)
    player.start()
    until(lambda: "ready" in viewer.states())
    return player, viewer


def watch(player, viewer, video, frames):
    """Shows frames as they come, until `frames` of them were sent."""

    def enough():
        sent = len(viewer.frames(video)[0])
        player.shown(video, sent)
        return sent >= frames

    until(enough)


def test_a_viewer_that_does_not_look_stops_the_device():
    player, viewer = ready(Model())
    model = player._load()
    player.play("one", 0)
    until(lambda: len(viewer.frames(1)[0]) == FPS)
    time.sleep(0.3)
    # A second of frames was sent; behind it wait a block that is being sent, one in the queue and
    # one that was made.
    assert len(viewer.frames(1)[0]) == FPS and model.made <= FPS // 2 + players.QUEUED + 2
    player.shown(1, 4)
    until(lambda: len(viewer.frames(1)[0]) == FPS + 4)
    time.sleep(0.3)
    assert viewer.frames(1)[0] == list(range(FPS + 4))


def test_a_prompt_in_mid_stream_is_accepted_and_then_applied():
    player, viewer = ready(Model())
    player.play("one", 0)
    until(lambda: len(viewer.frames(1)[0]) == FPS)
    player.ask(7, "passed over")
    player.ask(8, "seven")
    watch(player, viewer, 1, 20)
    assert [m["id"] for m in viewer.told("accepted")] == [7, 8]
    (applied,) = viewer.told("applied")  # of two, the newest
    assert applied["id"] == 8 and applied["video"] == 1
    blocks = viewer.told("block")
    assert [m["block"] for m in blocks] == list(range(len(blocks)))
    prompts = ["one" if m["block"] < applied["block"] else "seven" for m in blocks]
    assert [m["prompt"] for m in blocks] == prompts
    numbers, greys = viewer.frames(1)  # at once: more may come
    assert greys == [50 if number >= 2 * applied["block"] else 30 for number in numbers]
    assert blocks[1]["times"] == dict(denoising=0.1, cache=0.2, decoding=0.3, frames=2)
    assert blocks[1]["first"] == 2 and blocks[1]["total"]["frames"] == 4
    assert blocks[1]["first_frame"] == 0.25


def test_a_refused_prompt_leaves_the_video_as_it_is():
    player, viewer = ready(Model())
    player.play("one", 0)
    player.ask(3, "bad")
    watch(player, viewer, 1, 20)
    (refused,) = viewer.told("refused")
    assert refused["id"] == 3 and refused["reason"] == "bad is no prompt"
    assert set(viewer.frames(1)[1]) == {30} and not viewer.told("applied")


def test_a_refused_first_prompt_ends_in_ready():
    player, viewer = ready(Model())
    player.play("bad", 0)
    until(lambda: viewer.states()[-2:] == ["playing", "ready"])
    assert viewer.told("refused")[0]["reason"] == "bad is no prompt"
    player.ask(4, "seven")
    assert viewer.told("refused")[-1]["reason"] == "no video is played"


def test_a_reset_drops_what_waits_and_the_next_video_begins_at_once():
    player, viewer = ready(Model())
    player.play("one", 0)
    until(lambda: len(viewer.frames(1)[0]) == FPS)
    player.reset()
    until(lambda: viewer.states()[-1] == "ready")
    player.shown(1, 6)
    player.play("seven", 3)
    watch(player, viewer, 2, 8)
    assert len(viewer.frames(1)[0]) == FPS  # nothing of the first any more
    numbers, greys = viewer.frames(2)
    assert numbers[:8] == list(range(8)) and set(greys) == {53}


def test_a_video_in_place_of_another_needs_no_reset():
    player, viewer = ready(Model())
    for number in (1, 2, 3):
        player.play("one", number)
        watch(player, viewer, number, 4)
        assert set(viewer.frames(number)[1]) == {30 + number}


def test_of_videos_that_are_asked_for_while_it_loads_the_newest_is_made():
    load = threading.Event()
    player, viewer = Player(lambda: load.wait(10) and Model(), fps=FPS), Viewer()
    player.attach(viewer)
    player.start()
    for seed in range(50):
        player.play("one", seed)
    load.set()
    until(lambda: len(viewer.frames(50)[0]) == FPS)
    assert {m["video"] for m in viewer.told("block")} == {50}


def test_states_are_told_in_order():
    player, viewer = ready(Model(longest=3))
    states = viewer.told("state")
    assert [s for s, _ in itertools.groupby(viewer.states())] == ["loading", "compiling", "ready"]
    assert states[-1]["message"] == "blocks of 3 frames in 1 steps; compiled in 1.5 s"
    player.play("one", 0)
    watch(player, viewer, 1, 6)
    until(lambda: viewer.told("ended") and viewer.states()[-1] == "ready")
    assert viewer.told("ended") == [dict(type="ended", video=1, frames=6)]
    assert viewer.states()[-2:] == ["playing", "ready"]


@pytest.mark.parametrize("where", ["load", "video"])
def test_an_error_is_told(where):
    model = Model()
    model.release = None  # a block fails

    def load():
        if where == "load":
            raise ValueError("no such student")
        return model

    player, viewer = Player(load, fps=FPS), Viewer()
    player.attach(viewer)
    player.start()
    if where == "video":
        player.play("one", 0)
    until(lambda: viewer.states()[-1] == "error")
    wanted = "no such student" if where == "load" else "AttributeError"
    assert wanted in player.state["message"]


def test_a_viewer_that_goes_stops_its_video():
    player, viewer = ready(Model())
    player.play("one", 0)
    until(lambda: len(viewer.frames(1)[0]) == FPS)
    player.detach(viewer)
    until(lambda: player.state["state"] == "ready")
    other = Viewer()
    player.attach(other)
    assert other.states() == ["ready"]
    player.detach(viewer)  # of the one before: nothing
    player.play("one", 0)
    watch(player, other, 2, 8)


def test_what_was_shown_is_what_is_downloaded():
    player, viewer = ready(Model())
    with pytest.raises(ValueError, match="nothing was played"):
        player.download(".gif")
    player.play("one", 0)
    watch(player, viewer, 1, 12)
    player.reset()
    player.shown(1, 9)
    shown = player._play.shown
    with Image.open(io.BytesIO(player.download(".gif"))) as gif:
        # GIF joins frames that are equal: the whole time is what counts.
        length = sum(_duration(gif, i) for i in range(getattr(gif, "n_frames", 1)))
        assert gif.size == (6, 4) and length == pytest.approx(shown * 1000 / FPS, abs=10 * shown)


def _duration(gif, index):
    gif.seek(index)
    return gif.info["duration"]


def test_small_frames_are_sent_without_loss_and_large_ones_small():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 20, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode(small)))), small)
    large = np.tile(np.linspace(0, 255, 320, dtype=np.uint8)[None, :, None], (240, 1, 3))
    near = np.asarray(Image.open(io.BytesIO(encode(large)))).astype(int)
    assert len(encode(large)) < large.size / 20 and np.abs(near - large).max() < 6


# Over the network.


@pytest.fixture
def site():
    """(the address, the Player) of a served stand-in."""
    pytest.importorskip("websockets")
    from dmd_jax.pipelines import server

    player = Player(Model, fps=FPS)
    with server.serve(player, "localhost", 0, title="student", fps=FPS) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"localhost:{serving.socket.getsockname()[1]}", player


def fetch(address, path, **headers):
    """(status, type, body) of an HTTP request."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    try:
        answer = opener.open(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers["Content-Type"], answer.read()


def connect(address, **how):
    from websockets.sync import client

    return client.connect(f"ws://{address}/socket", proxy=None, **how)


def hear(socket, kind):
    """The next message of a type; "frame" for a frame."""
    while True:
        message = socket.recv(timeout=20)
        if isinstance(message, bytes):
            if kind == "frame":
                return struct.unpack("<II", message[:8])
        elif (given := json.loads(message))["type"] == kind:
            return given


def test_the_page_and_its_video_come_over_the_network(site):
    address, player = site
    status, kind, body = fetch(address, "/")
    assert status == 200 and kind.startswith("text/html") and b"<canvas" in body
    assert b"http://" not in body and b"https://" not in body  # nothing from elsewhere
    assert fetch(address, "/healthz")[0] == 503
    assert fetch(address, "/nothing")[0] == 404
    player.start()
    with connect(address) as socket:
        hello = hear(socket, "hello")
        assert hello["title"] == "student" and hello["fps"] == FPS and "gif" in hello["formats"]
        until(lambda: fetch(address, "/healthz")[0] == 200)
        assert fetch(address, "/video.gif")[0] == 409
        socket.send(json.dumps(dict(type="play", prompt=" one ", seed=5)))
        assert hear(socket, "block")["prompt"] == "one"
        for number in range(10):
            assert hear(socket, "frame") == (1, number)
            socket.send(json.dumps(dict(type="shown", video=1, frames=number + 1)))
        socket.send(json.dumps(dict(type="prompt", id=1, prompt="seven")))
        assert hear(socket, "accepted")["id"] == 1
        for number in itertools.count(11):
            # Shown first: all that may be ahead of the viewer can have come before the receipt.
            socket.send(json.dumps(dict(type="shown", video=1, frames=number)))
            message = socket.recv(timeout=20)
            if not isinstance(message, bytes) and json.loads(message)["type"] == "applied":
                break
        until(lambda: player._play.shown >= 10)
        status, kind, body = fetch(address, "/video.gif")
        assert (status, kind) == (200, "image/gif") and body.startswith(b"GIF8")
    until(lambda: player._play.stopped)  # the page has gone


@pytest.mark.parametrize(
    "message, complaint",
    [
        ("not JSON", "was not understood"),
        ("[]", "was not understood"),
        ('{"type": "dance"}', "there is no message of type 'dance'"),
        ('{"type": "play", "prompt": 3, "seed": 0}', "prompt must be a text"),
        ('{"type": "play", "prompt": "one", "seed": -1}', "seed=-1 must be an integer"),
        ('{"type": "play", "prompt": "one"}', "'seed'"),
        ('{"type": "shown", "video": 1, "frames": 1.5}', "frames=1.5 must be an integer"),
    ],
)
def test_a_message_that_is_not_understood_is_refused(site, message, complaint):
    with connect(site[0]) as socket:
        socket.send(message)
        assert complaint in hear(socket, "refused")["reason"]


def test_other_sites_are_refused(site):
    from websockets.exceptions import InvalidStatus

    address, _ = site
    assert fetch(address, "/", Host="elsewhere.example")[0] == 403
    assert fetch(address, "/", Origin="http://elsewhere.example")[0] == 403
    assert fetch(address, "/", Origin=f"http://{address}")[0] == 200
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, origin="http://elsewhere.example")


def test_the_page_that_was_opened_last_has_the_player(site):
    from websockets.exceptions import ConnectionClosed

    address, player = site
    player.start()
    with connect(address) as first:
        hear(first, "hello")
        with connect(address) as second:
            hear(second, "hello")
            with pytest.raises(ConnectionClosed, match="4000"):
                while True:
                    first.recv(timeout=20)
            second.send(json.dumps(dict(type="play", prompt="one", seed=0)))
            assert hear(second, "frame") == (1, 0)

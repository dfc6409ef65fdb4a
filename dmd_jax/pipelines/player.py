"""Plays a stream to one viewer: one thread makes frames, another sends them, neither runs ahead.

Frames wait in two places, both bounded: at most `QUEUED` blocks between the threads, and at most a
second of frames that were sent and are not yet shown. So a new prompt is seen soon, and a viewer
that stops looking stops the device. Imports `video_stream` and `video` beside it.
"""

import dataclasses
import io
import logging
import queue
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmd_jax.pipelines import streaming
from dmd_jax.pipelines.video import video_writer
from dmd_jax.pipelines.video_stream import StreamModel

log = logging.getLogger(__name__)

QUEUED = 1  # blocks that wait for the sender
LOSSLESS = 128 * 128  # pixels of a frame up to which it is sent as PNG, and as JPEG above
Send = Callable[[dict[str, Any] | bytes], None]


class Recording:
    """The encoded frames of a video in a temporary file: memory does not grow with its length."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it is as old as this object
        self._ends, self._lock = [0], threading.Lock()

    def append(self, encoded: bytes) -> None:
        with self._lock:
            self._file.seek(self._ends[-1])
            self._file.write(encoded)
            self._ends.append(self._file.tell())

    def save(self, suffix: str, frames: int, fps: float) -> bytes:
        """The first `frames` frames as a file of `suffix`, ".mp4" or ".gif".

        Raises:
            ValueError: there is no frame yet.
            ImportError: .mp4 without PyAV.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"video{suffix}"
            with video_writer(path, fps) as write:
                for index in range(min(frames, len(self._ends) - 1)):
                    write(self._read(index)[None])
            return path.read_bytes()

    def _read(self, index):
        with self._lock:
            self._file.seek(self._ends[index])
            encoded = self._file.read(self._ends[index + 1] - self._ends[index])
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def encode(frame: np.ndarray) -> bytes:
    """A frame, uint8 [H, W, 3], as PNG or JPEG (`LOSSLESS`)."""
    file, small = io.BytesIO(), frame.shape[0] * frame.shape[1] <= LOSSLESS
    Image.fromarray(frame).save(file, **(dict(format="PNG") if small else JPEG))
    return file.getvalue()


JPEG = dict(format="JPEG", quality=90)


class Play:
    """One video from its first frame until it is stopped.

    Attributes:
        number: of the video; every message about it says so.
        prompt, seed: what it begins with.
        began: `time.perf_counter()` when it was asked for.
        recording: what was sent.
        shown: how many frames the viewer has shown.
    """

    def __init__(self, number: int, prompt: str, seed: int, ahead: int):
        self.number, self.prompt, self.seed, self.began = number, prompt, seed, time.perf_counter()
        self.recording, self.shown = Recording(), 0
        self._ahead, self._blocks = ahead, queue.Queue(QUEUED)
        self._asked, self._stopped = None, False
        self._changed = threading.Condition()  # guards _asked, _stopped and shown

    def stop(self) -> None:
        """Ends the video; what was not yet sent is dropped."""
        self._change(_stopped=True)

    def ask(self, number: int, prompt: str) -> None:
        """Asks for another prompt from the next block on; of several, the newest."""
        self._change(_asked=(number, prompt))

    def show(self, frames: int) -> None:
        """The viewer has shown so many frames."""
        self._change(shown=max(self.shown, frames))

    def _change(self, **values):
        with self._changed:
            self.__dict__.update(values)
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def take_asked(self) -> tuple[int, str] | None:
        """The (number, prompt) that was asked for since the last call."""
        with self._changed:
            asked, self._asked = self._asked, None
        return asked

    def put(self, block: tuple[dict[str, Any], np.ndarray] | None) -> None:
        """Hands a block to the sender, when it has room; None is the end."""
        while not self._stopped:
            try:
                return self._blocks.put(block, timeout=0.1)
            except queue.Full:
                continue

    def send_all(self, send: Send) -> None:
        """Sends blocks until the end: a message, then the frames.

        A frame is two little-endian uint32, the video's number and the frame's, and the file.
        """
        count = 0
        while (block := self._get()) is not None:
            message, frames = block
            send(message)
            for frame in frames:
                encoded = encode(frame)
                self._wait_for_viewer(count)
                if self._stopped:
                    return
                self.recording.append(encoded)
                send(struct.pack("<II", self.number, count) + encoded)
                count += 1
        if not self._stopped:
            send(dict(type="ended", video=self.number, frames=count))

    def _wait_for_viewer(self, frame):
        """Until a frame may be sent, or the video is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or frame < self.shown + self._ahead)

    def _get(self):
        while not self._stopped:
            try:
                return self._blocks.get(timeout=0.1)
            except queue.Empty:
                continue
        return None


class Player:
    """The device's side of a page: loads a model, and makes one video at a time for one viewer.

    Messages to the viewer are dicts with a `type`: `state` (loading, compiling, ready, playing or
    error, with a `message`), `block` before the frames of a block (its number, prompt and times),
    `accepted`, `applied` and `refused` for a prompt, `ended`; frames are bytes (`Play.send_all`).

    Attributes:
        state: the last `state` message.
    """

    def __init__(self, load: Callable[[], StreamModel], *, fps: float):
        """
        Args:
            load: returns the model; it is called in the thread that makes frames.
            fps: frames per second at which the viewer shows them.
        """
        self._load, self._fps = load, fps
        self.state: dict[str, Any] = dict(type="state", state="loading", message="")
        self._send: Send | None = None
        self._play: Play | None = None  # the last that was asked for
        self._lock = threading.RLock()
        self._asked = threading.Event()  # a play was

    def start(self) -> None:
        """Begins to load and to compile, in a thread of its own."""
        threading.Thread(target=self._run, name="player", daemon=True).start()

    # The viewer's side.

    def attach(self, send: Send) -> None:
        """Makes `send` the viewer, in place of another, and tells it the state.

        Args:
            send: takes a message or a frame, from any thread; it raises nothing.
        """
        with self._lock:
            self.reset()
            self._send = send
            send(self.state)

    def detach(self, send: Send) -> None:
        """The viewer has gone; what it watched is stopped."""
        with self._lock:
            if self._send is send:
                self.reset()
                self._send = None

    def play(self, prompt: str, seed: int) -> None:
        """Begins a video in place of the one that is played."""
        with self._lock:
            self.reset()
            number = 1 if self._play is None else self._play.number + 1
            self._play = Play(number, prompt, seed, ahead=max(round(self._fps), 1))
            self._asked.set()

    def ask(self, number: int, prompt: str) -> None:
        """Changes the prompt of the video; `number` comes back with the receipts."""
        if self._play is None or self._play.stopped:
            return self._tell(dict(type="refused", id=number, reason="no video is played"))
        self._tell(dict(type="accepted", id=number))
        self._play.ask(number, prompt)

    def reset(self) -> None:
        """Stops the video."""
        if self._play is not None:
            self._play.stop()

    def shown(self, video: int, frames: int) -> None:
        """The viewer has shown the first `frames` frames of a video."""
        if self._play is not None and self._play.number == video:
            self._play.show(frames)

    def download(self, suffix: str) -> bytes:
        """What was shown of the last video. Raises as `Recording.save`."""
        if self._play is None:
            raise ValueError("nothing was played yet")
        return self._play.recording.save(suffix, self._play.shown, self._fps)

    # The device's side.

    def _tell(self, message):
        send = self._send
        if send is not None:
            send(message)

    def _set_state(self, state, message=""):
        self.state = dict(type="state", state=state, message=message)
        self._tell(self.state)

    def _run(self):
        try:
            self._set_state("loading")
            model = self._load()
            self._set_state("compiling")
            seconds = model.warm_up()
            ready = f"{streaming.title(model.sampler)}; compiled in {seconds:.1f} s"
            while True:
                self._set_state("ready", ready)
                self._asked.wait()
                self._asked.clear()
                play = self._play
                if not play.stopped:
                    self._set_state("playing")
                    self._make(model, play)
        except Exception as error:
            self.reset()
            log.exception("the player has stopped")
            self._set_state("error", f"{type(error).__name__}: {error}")

    def _make(self, model, play):
        """Makes blocks until the video is stopped, or has no room for more."""
        try:
            cond = model.embed(play.prompt)
        except ValueError as error:
            play.stop()
            return self._tell(dict(type="refused", id=0, reason=str(error)))
        video, prompt = model.start(cond, play.seed, began=play.began), play.prompt
        sender = threading.Thread(target=self._send_all, args=(play,), daemon=True)
        sender.start()
        while not play.stopped and not video.full:
            prompt = self._switched(model, play, video, prompt)
            piece = next(video)
            play.put((_message(play, video, piece, prompt), piece.frames))
        play.put(None)
        sender.join()

    def _send_all(self, play):
        try:
            play.send_all(self._tell)
        except Exception as error:  # no room for the recording
            log.exception("the sender has stopped")
            play.stop()
            self._tell(dict(type="refused", id=0, reason=f"{type(error).__name__}: {error}"))

    def _switched(self, model, play, video, prompt):
        """The prompt of the next block."""
        asked = play.take_asked()
        if asked is None:
            return prompt
        number, wanted = asked
        try:
            video.switch(model.embed(wanted))
        except ValueError as error:
            self._tell(dict(type="refused", id=number, reason=str(error)))
            return prompt
        self._tell(dict(type="applied", id=number, video=play.number, block=video.blocks))
        return wanted


def _message(play, video, piece, prompt):
    """What the viewer is told before the frames of a block."""
    first = video.times.frames - len(piece.frames)
    return dict(
        type="block",
        video=play.number,
        block=piece.block,
        first=first,
        frames=len(piece.frames),
        prompt=prompt,
        times=dataclasses.asdict(piece.times),
        total=dataclasses.asdict(video.times),
        first_frame=video.first_frame,
    )

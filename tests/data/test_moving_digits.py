"""Moving digits: captions that are true, digits that stay inside, and arrays that fold back."""

import dataclasses
import re

import numpy as np
import pytest

from dmd_jax.data import MovingDigits, word_vectors
from dmd_jax.data import moving_digits as md
from dmd_jax.data.scans import INK
from dmd_jax.models.wan import WanConfig

VIDEOS, PROMPTS = md.moving_digits(160, seed=3)


def centres(video):
    """Mean (row, column) of the ink in each frame."""
    weights = video[..., 0].astype(float)
    grid = np.mgrid[: md.SIZE, : md.SIZE]
    return np.stack([(weights * axis).sum((1, 2)) / weights.sum((1, 2)) for axis in grid], axis=1)


def test_every_prompt_has_its_videos():
    np.testing.assert_array_equal(np.bincount(PROMPTS), np.full(len(md.PROMPTS), 2))


def test_digits_move_as_their_captions_say_and_stay_whole():
    for video, prompt in zip(VIDEOS, PROMPTS, strict=True):
        motion = md.PROMPTS[prompt].split(" moves ")[1]
        steps = np.diff(centres(video), axis=0)
        np.testing.assert_allclose(
            steps, np.tile(md.MOTIONS[motion], (md.FRAMES - 1, 1)) * md.SPEED, atol=1e-9
        )
        assert len(set(video.sum((1, 2, 3), dtype=int))) == 1  # no ink is cut off


def test_digits_are_training_scans_of_their_class_whole_and_small():
    from PIL import Image

    from dmd_jax.data import mnist5k

    def shrunk(window):
        small = Image.fromarray(window).resize((md.DIGIT, md.DIGIT), Image.Resampling.BOX)
        return np.asarray(small).tobytes()

    with np.load(mnist5k.FILE) as file:
        scans, labels = file["train_images"][..., 0], file["train_labels"]
    for video, prompt in zip(VIDEOS[::23], PROMPTS[::23], strict=True):
        of_class = scans[labels == md.DIGITS.index(md.PROMPTS[prompt].split()[0])]
        ink = video[0].sum(dtype=int) * (INK / md.DIGIT) ** 2
        of_class = of_class[np.abs(of_class.sum((1, 2), int) / ink - 1) < 0.1]
        windows = np.lib.stride_tricks.sliding_window_view(of_class, (INK, INK), (1, 2))
        known = {shrunk(window) for window in windows.reshape(-1, INK, INK)}
        digits = np.lib.stride_tricks.sliding_window_view(video[0, ..., 0], (md.DIGIT, md.DIGIT))
        assert any(x.tobytes() in known for x in digits.reshape(-1, md.DIGIT, md.DIGIT))


def test_a_seed_makes_the_same_videos_and_another_others():
    again, _ = md.moving_digits(160, seed=3)
    other, _ = md.moving_digits(160, seed=4)
    np.testing.assert_array_equal(again, VIDEOS)
    assert np.mean(np.any(other != VIDEOS, axis=(1, 2, 3, 4))) > 0.9


def test_real_videos_show_what_their_prompts_ask_for():
    assert md.judge(VIDEOS, PROMPTS) == {"digit": 1.0, "motion": 1.0, "flicker": 0.0}
    unseen = md.judge(*md.moving_digits(160, seed=3, split="test"))
    assert 0.8 < unseen["digit"] < 1 and unseen["motion"] == 1


def test_other_prompts_are_told_apart():
    other_digit = (PROMPTS + len(md.MOTIONS)) % len(md.PROMPTS)
    assert md.judge(VIDEOS, other_digit) == {"digit": 0.0, "motion": 1.0, "flicker": 0.0}
    other_motion = PROMPTS // 8 * 8 + (PROMPTS + 1) % 8
    assert md.judge(VIDEOS, other_motion)["motion"] == 0


def test_flicker_is_the_variance_of_the_frames_over_what_they_share():
    noise = np.random.default_rng(0).normal(0, 20, VIDEOS.shape)
    noisy = np.clip(VIDEOS[:80] // 2 + 64 + noise[:80], 0, 255).astype(np.uint8)
    shared = np.square(VIDEOS[:80, 0] / 2 + 64.0).mean((1, 2, 3))
    expected = 400 * (1 - 1 / md.FRAMES) / np.median(shared)
    # One part in a hundred: what is left of the noise in the mean, and what was rounded down.
    assert md.judge(noisy, PROMPTS[:80])["flicker"] == pytest.approx(expected, rel=0.03)


def test_folding_turns_round():
    latents = md.encode(VIDEOS)
    assert latents.shape == (160, *MovingDigits.sample_shape)
    np.testing.assert_array_equal(md.decode(latents), VIDEOS)
    square = np.zeros_like(VIDEOS[:1, :1])
    square[0, 0, 4:6, 8:10] = 255
    only = np.argwhere(md.encode(square).max(-1) > 0)
    np.testing.assert_array_equal(only, [[0, 0, 2, 4]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("digits")
    where = {"embeddings": str(directory / "text"), "latents": str(directory / "latents")}
    result = MovingDigits(num=160, seed=3, **where)
    result.open()
    return result


def test_source_gives_videos_with_the_captions_that_belong_to_them(source):
    batch = source.examples([5, 90])
    np.testing.assert_array_equal(md.decode(batch["data"]), VIDEOS[[5, 90]])
    three, eleven = word_vectors.embed([md.PROMPTS[5], md.PROMPTS[10]])
    np.testing.assert_allclose(batch["cond"][0, : len(three)].astype(float), three, rtol=2**-8)
    np.testing.assert_allclose(batch["cond"][1, : len(eleven)].astype(float), eleven, rtol=2**-8)
    assert not batch["cond"][0, len(three) :].any() and not batch["uncond"].any()
    pictures = source.pictures(batch["data"])
    assert pictures.shape == (2, md.SIZE, md.FRAMES * md.SIZE, 1)
    np.testing.assert_array_equal(pictures[0, :, : md.SIZE], VIDEOS[5, 0])


def test_files_are_written_once(source, monkeypatch):
    monkeypatch.setattr(md, "encode", None)
    again = MovingDigits(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source)})
    again.open()
    np.testing.assert_array_equal(again.examples([7])["data"], source.examples([7])["data"])


def test_another_seed_does_not_go_into_the_same_directory(source):
    with pytest.raises(ValueError, match="another folder"):
        dataclasses.replace(source, seed=4).open()


@pytest.mark.parametrize(
    "change", [{"num": 0}, {"seed": -1}, {"latents": None}, {"sample_shape": (3, 4)}]
)
def test_numbers_that_make_no_videos_are_refused(source, change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name}={re.escape(str(value))}"):
        dataclasses.replace(source, **change)


def test_a_network_of_other_latents_or_texts_is_refused(source):
    fits = WanConfig(8, 8, heads=2, depth=1, in_channels=4, out_channels=4, text_dim=64)
    source.require_fit("config.generator", fits)
    with pytest.raises(ValueError, match=r"config\.generator reads texts of width 32"):
        source.require_fit("config.generator", dataclasses.replace(fits, text_dim=32))
    other = dataclasses.replace(fits, in_channels=16, out_channels=16)
    with pytest.raises(ValueError, match=r"config\.generator makes latents of 16 channels"):
        source.require_fit("config.generator", other)

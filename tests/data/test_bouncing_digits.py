"""Bouncing digits: real scans that move as their captions say and leave walls at random."""

import itertools

import numpy as np

from dmd_jax.data import BouncingDigits, word_vectors
from dmd_jax.data import bouncing_digits as bd
from dmd_jax.data.scans import small_scans

FAST, SLOW = bd.PROMPTS.index("seven bounces fast"), bd.PROMPTS.index("seven bounces slowly")
LOW, HIGH = 1, bd.SIZE - bd.DIGIT - 1


def paths(speed, frames=200, num=50):
    return np.stack([bd.path(np.random.default_rng(i), speed, frames) for i in range(num)])


def test_a_frame_is_one_scan_of_the_class_somewhere_in_the_box():
    scans, labels = small_scans("train", bd.DIGIT)
    known = {scan.tobytes() for scan in scans[labels == 7]}
    video = bd.inside(bd.video(FAST, (0, 1), 30))[..., 0]
    windows = np.lib.stride_tricks.sliding_window_view(video, (bd.DIGIT, bd.DIGIT), (1, 2))
    for frame, of_frame in zip(video, windows, strict=True):
        whole = of_frame.reshape(-1, bd.DIGIT, bd.DIGIT)
        found = [w.tobytes() for w in whole if w.sum(dtype=int) == frame.sum(dtype=int)]
        assert known.intersection(found)


def test_a_move_is_one_place_in_one_of_eight_directions_at_the_speed_of_the_caption():
    directions = {*itertools.product((-1, 0, 1), repeat=2)} - {(0, 0)}
    for speed in bd.SPEEDS.values():
        moves, every = np.diff(paths(speed), axis=1) / bd.PLACE, round(1 / speed)
        assert {*map(tuple, moves[:, every - 1 :: every].reshape(-1, 2))} == directions
        assert not np.delete(moves, np.s_[every - 1 :: every], 1).any()


def test_a_digit_goes_straight_until_a_wall():
    places = paths(1.0)
    moves = np.diff(places, axis=1)
    turned = (moves[:, 1:] != moves[:, :-1]).any(-1)
    at_wall = ((places == LOW) | (places == HIGH)).any(-1)[:, 1:-1]
    assert turned.any() and not turned[~at_wall].any()


def test_the_direction_after_a_wall_is_random():
    """From the left wall, as many digits go up as down, and none goes left."""
    rng = np.random.default_rng(0)
    directions = np.stack([bd._direction(rng, np.array([0, 1])) for _ in range(4_000)])
    assert directions[:, 1].min() == 0 and directions[:, 1].max() == 1
    assert abs(directions[:, 0].mean()) < 0.06  # 4.2 standard errors


def test_a_longer_video_begins_with_the_shorter_and_a_path_stays_in_the_box():
    np.testing.assert_array_equal(bd.video(SLOW, (3,), 40)[:12], bd.video(SLOW, (3,), 12))
    places = paths(3.0)
    assert places.min() == LOW and places.max() == HIGH


def test_latents_are_normalised_and_decode_to_the_same_pixels():
    source = BouncingDigits()
    data = source.examples(range(400))["data"]
    assert abs(data.mean()) < 0.05 and abs(data.std() - 1) < 0.1  # the scale of the noise
    videos = np.stack([bd.video(i % len(bd.PROMPTS), (0, i)) for i in range(2)])
    np.testing.assert_array_equal(bd.decode(data[:2]), videos)


def test_examples_have_their_captions_and_are_the_same_at_every_reading():
    source = BouncingDigits(frames=6, seed=2)
    batch = source.examples([5, 25, 2])
    assert batch["data"].shape == (3, *source.sample_shape) == (3, 6, 6, 6, 36)
    np.testing.assert_array_equal(batch["cond"][0], batch["cond"][1])  # 20 prompts take turns
    three = word_vectors.embed([bd.PROMPTS[2]])[0]
    np.testing.assert_array_equal(batch["cond"][2, : len(three)], three)
    np.testing.assert_array_equal(batch["data"], source.examples([5, 25, 2])["data"])
    np.testing.assert_array_equal(batch["cond"], source.conditions([5, 25, 2])["cond"])
    assert not batch["uncond"].any()

"""Trajectories from files: a teacher's ODE along real videos, resumed, and Self-Forcing's files."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from toys import weights as random_weights

from dmd_jax import ode_pairs, weights
from dmd_jax.data import OdePairs, embeddings, latents, trajectories
from dmd_jax.devices import randomness, sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.causal_ode import CausalODE
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import Causal
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.pipelines import ode_pairs as pairs
from dmd_jax.rollouts.samplers import ManyStep

SHAPE, TWO = (4, 2, 2, 2), Causal(frames_per_block=2)
CONFIG = WanConfig(16, 16, 2, 1, in_channels=2, out_channels=2, text_dim=8, freq_dim=16)
VIDEOS = np.random.default_rng(3).standard_normal((5, *SHAPE)).astype(np.float16)
PROMPTS = ["a cat", "rain"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a causal teacher of random weights."""
    net = random_weights(lambda rngs: Wan(CONFIG, rngs=rngs), 2)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    weights.save(path, Denoiser(net))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng, path = np.random.default_rng(1), tmp_path_factory.mktemp("texts")
    rows = {prompt: rng.standard_normal((3, 8)) for prompt in [*PROMPTS, ""]}
    embeddings.write(path, PROMPTS, "", lambda asked: [rows[p] for p in asked], 4, 8)
    return path


@pytest.fixture
def one_device(monkeypatch):
    """A mesh of one device: it compiles in less time than one of eight."""
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)


def encoded(path, videos=VIDEOS):
    latents.write(path, [(video, i % 2) for i, video in enumerate(videos)], np.asarray, SHAPE)
    return path


@pytest.fixture
def program(call, teacher, texts, tmp_path):
    """`call` of `python -m dmd_jax.ode_pairs`, with the usual flags where none are given."""
    usual = dict(checkpoint=teacher, embeddings=texts, out=tmp_path / "pairs", steps=8)
    usual |= dict(latents=encoded(tmp_path / "latents"), frames_per_block=2, batch=2)

    def program(**given):
        flags = (usual | given).items()
        return call(ode_pairs, *(f"--{k}={v}" for k, v in flags if v is not None))

    return program


def rows(path):
    store = trajectories.Trajectories(path)
    return store.rows(range(len(store)))


@pytest.mark.usefixtures("one_device")
def test_a_row_is_the_ode_of_each_block_after_the_real_ones(
    program, teacher, texts, tmp_path, capsys
):
    """Against the sampler, one block at a time, the network reading a cache of real blocks."""
    assert program(guidance=2) is None
    output = capsys.readouterr().out
    assert "video 5 of 5" in output and "5 trajectories, [6, 4, 2, 2, 2] each" in output
    stored = rows(tmp_path / "pairs")
    np.testing.assert_array_equal(stored[:, 5], VIDEOS.astype(np.float32))
    noise = randomness.normal(jax.random.key(0), jnp.arange(5), SHAPE)
    np.testing.assert_allclose(stored[:, 0], noise, rtol=2**-10, atol=1e-4)

    denoiser, store = weights.denoiser(teacher), embeddings.Embeddings(texts)
    cond = store.rows(np.arange(5) % 2)
    uncond = np.broadcast_to(store.negative, cond.shape)

    def video(cond, first):
        """What the network says of the block at `first`, after a cache of the real block."""
        net, cache = denoiser.net, denoiser.empty_cache(5, 4, 2, 2)
        if first:
            _, own = net(VIDEOS[:, :2], jnp.zeros(5), cond, causal=TWO, cache=cache, start=0)
            cache = kv_cache.write(cache, own, kv_cache.ring(TWO, 4))
        how = dict(causal=TWO, cache=cache, start=first)
        return jax.jit(lambda x, t: denoiser.predict(x, t, cond, **how).x0)

    for first in (0, 2):
        ours, theirs = video(cond, first), video(uncond, first)

        def block(x, t, _, ours=ours, theirs=theirs):
            return theirs(x, t) + 2.0 * (ours(x, t) - theirs(x, t))

        block.schedule = denoiser.schedule
        sampler = ManyStep(8, shift=5.0)
        made = sampler(block, noise[:, first : first + 2], cond, uncond, None, None)
        np.testing.assert_allclose(stored[:, 4, first : first + 2], made, rtol=2e-3, atol=2e-3)


def test_the_end_does_not_depend_on_the_future(program, tmp_path):
    """Nor on the block's own real frames, nor on how many videos are solved in one call.

    On eight devices.
    """
    program()
    changed = VIDEOS.copy()
    changed[:, 2:] += 1
    program(latents=encoded(tmp_path / "changed", changed), out=tmp_path / "other", batch=5)
    one, other = rows(tmp_path / "pairs"), rows(tmp_path / "other")
    np.testing.assert_allclose(one[:, :5], other[:, :5], rtol=2**-9, atol=1e-3)
    changed[:, 0] += 1
    program(latents=encoded(tmp_path / "earlier", changed), out=tmp_path / "third", batch=5)
    moved = np.abs(rows(tmp_path / "third")[:, 4] - one[:, 4]).max(axis=(0, 2, 3, 4))
    assert (moved[:2] < 1e-3).all() and (moved[2:] > 1e-2).all()


@pytest.mark.usefixtures("one_device")
def test_a_stopped_run_goes_on_and_another_one_is_refused(program, monkeypatch, tmp_path):
    monkeypatch.setattr(trajectories, "SHARD", 2)
    solve, solved = pairs._solve, []

    def stopping(teacher, root, index, *rest):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(list(index))
        return solve(teacher, root, index, *rest)

    monkeypatch.setattr(pairs, "_solve", stopping)
    with pytest.raises(KeyboardInterrupt):
        program()
    assert solved == [[0, 1], [2, 3]]
    solved.clear()
    assert program() is None and solved == [[4, 0]]
    solved.clear()
    assert program() is None and solved == []
    for change in (dict(guidance=3), dict(steps=16), dict(seed=1), dict(window=2)):
        assert "has latents with source = " in program(**change)
    assert "has latents with shape = " in program(times="1,.5")


@pytest.mark.usefixtures("one_device")
def test_training_reads_the_pairs(program, texts, tmp_path):
    program()
    source = OdePairs(str(texts), SHAPE, str(tmp_path / "pairs"))
    source.open()
    batch = source.examples(range(4)) | {"index": jnp.arange(4)}
    student = Denoiser(random_weights(lambda rngs: Wan(CONFIG, rngs=rngs), 5))
    loss, _ = CausalODE(SHAPE, TWO).generator_loss(student, {}, batch, jax.random.key(0))
    assert np.isfinite(loss) and loss > 0


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (dict(checkpoint=None), "name a teacher as --checkpoint"),
        (dict(lmdb="somewhere"), "name a teacher as --checkpoint"),
        (dict(latents=None), "name the real videos"),
        (dict(latents="nowhere"), "there are no latents"),
        (dict(checkpoint="nowhere"), "nowhere"),
        (dict(embeddings="nowhere"), "there are no embeddings"),
        (dict(frames_per_block=3), "4 frames do not divide into blocks of 3"),
        (dict(steps=10), "0.75 lies between two of the 10 steps"),
        (dict(times="1,x"), "--times=1,x"),
        (dict(times=".5,1"), "must descend"),
        (dict(window=1), "window=1 is smaller"),
        (dict(out="/dev/null"), "cannot be written to"),
    ],
)
def test_what_does_not_fit_is_refused(program, monkeypatch, tmp_path, flags, complaint):
    monkeypatch.setattr(pairs, "_solve", None)
    monkeypatch.chdir(tmp_path)
    output = program(**flags)
    assert output.startswith("error: ") and complaint in output, output


@pytest.mark.parametrize(
    "notes, complaint",
    [
        (dict(causal=dict(frames_per_block=1)), "Causal(frames_per_block=1, "),
        (dict(causal=dict(frames_per_block=2, sink=1)), "sink=1, keep_sink=False), not Causal("),
        (dict(context_time=0.2), "was trained with context_time=0.2"),
    ],
)
def test_a_teacher_of_other_blocks_or_another_context_is_refused(
    program, teacher, monkeypatch, tmp_path, notes, complaint
):
    monkeypatch.setattr(pairs, "_solve", None)
    path = tmp_path / "other.safetensors"
    weights.save(path, weights.denoiser(teacher), **notes)
    output = program(checkpoint=path)
    assert output.startswith("error: ") and complaint in output, output


def test_pairs_of_images_are_noises_and_the_ends_that_the_sampler_reaches(
    call, tmp_path, capsys, monkeypatch
):
    """For the classes in turn, on eight devices."""
    path, out = programs.save_tiny(tmp_path / "teacher.safetensors"), tmp_path / "pairs"
    monkeypatch.setattr(trajectories, "IMAGE_SHARD", 8)
    flags = [f"--checkpoint={path}", f"--out={out}", "--guidance=2", "--steps=4", "--batch=8"]
    assert call(ode_pairs, *flags, "--num=13") is None
    output = capsys.readouterr().out
    assert "image 8 of 13" in output and "13 trajectories, [2, 28, 28, 1] each" in output
    store = trajectories.Trajectories(out)
    np.testing.assert_array_equal(store.prompt, np.arange(13) % 10)
    noise = randomness.normal(jax.random.key(0), jnp.arange(13), (28, 28, 1))
    labels = jnp.arange(13) % 10
    ends = ManyStep(4, guidance=2.0)(
        weights.denoiser(path), noise, labels, jnp.full(13, 10), None, None
    )
    np.testing.assert_allclose(store.rows(range(13))[:, 0], noise, rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(store.rows(range(13))[:, 1], ends, rtol=2e-3, atol=2e-3)
    other = call(ode_pairs, *flags, "--num=14")
    assert "has latents with source = {'num': 13}, not {'num': 14}" in other


def test_a_teacher_of_images_takes_no_videos(program, tmp_path):
    path = programs.save_tiny(tmp_path / "teacher.safetensors")
    output = program(checkpoint=path, frames_per_block=None)
    assert "--embeddings: " in output and "makes images of a class, not videos" in output
    assert "name the folder of the captions' embeddings" in program(embeddings=None)


CHANNELS_FIRST = (4, 2, 2, 2)  # F C H W


def write_lmdb(path, points, prompts, shape=None):
    """A database as Self-Forcing's scripts write one."""
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as file, file.begin(write=True) as to:
        to.put(b"latents_shape", " ".join(map(str, shape or points.shape)).encode())
        to.put(b"prompts_shape", str(len(prompts)).encode())
        for i, (row, prompt) in enumerate(zip(points, prompts, strict=True)):
            to.put(f"latents_{i}_data".encode(), row.astype(np.float16).tobytes())
            to.put(f"prompts_{i}_data".encode(), prompt.encode())
    return path


@pytest.fixture
def convert(program):
    return functools.partial(program, checkpoint=None, latents=None, shift=8)


def stored_points(count, points):
    values = np.random.default_rng(7).standard_normal((count, points, *CHANNELS_FIRST))
    return values.astype(np.float16)


@pytest.mark.parametrize("points", [5, 6], ids=["self_forcing", "causal_forcing"])
def test_an_lmdb_is_converted(convert, texts, tmp_path, points, capsys):
    theirs = stored_points(3, points)
    folder = write_lmdb(tmp_path / "lmdb", theirs, ["rain", "a  cat\n", "rain"])
    assert convert(lmdb=folder) is None
    assert (tmp_path / "pairs" / "prompts.txt").read_text() == "rain\na cat\n"
    assert "3 trajectories; their prompts: " in capsys.readouterr().out
    source = OdePairs(str(texts), SHAPE, str(tmp_path / "pairs"))
    source.open()
    batch = source.examples([2, 1])
    wanted = np.moveaxis(theirs, 3, -1).astype(np.float32)[[2, 1]]
    np.testing.assert_array_equal(batch["data"], wanted[:, -1])  # the end, or the real video
    for i, time in enumerate((1.0, 0.96, 8 / 9, 8 / 11, 0.0)):
        stored = min(batch["trajectory"], key=lambda t, time=time: abs(t - time))
        assert stored == pytest.approx(time, abs=1e-6)
        np.testing.assert_array_equal(batch["trajectory"][stored], wanted[:, i])
    assert np.array_equal(batch["cond"], embeddings.Embeddings(texts).rows([1, 0]))


def test_a_folder_of_databases_is_read_as_one(convert, tmp_path):
    theirs = stored_points(5, 5)
    write_lmdb(tmp_path / "lmdb" / "b", theirs[2:], ["rain"] * 3)
    write_lmdb(tmp_path / "lmdb" / "a", theirs[:2], ["a cat"] * 2)
    assert convert(lmdb=tmp_path / "lmdb") is None
    stored = trajectories.Trajectories(tmp_path / "pairs")
    np.testing.assert_array_equal(stored.prompt, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(stored.rows(range(5))[:, :5], np.moveaxis(theirs, 3, -1))


def test_what_is_no_such_database_is_told(convert, tmp_path):
    pytest.importorskip("lmdb")
    theirs = stored_points(2, 5)
    write = functools.partial(write_lmdb, points=theirs, prompts=["rain", "rain"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data.mdb").write_bytes(b"something else" * 1000)
    for folder, complaint in (
        (tmp_path / "empty", "there is no LMDB database"),
        (tmp_path / "foreign", "cannot be read as an LMDB database"),
        (write(tmp_path / "image", shape=(2, 4, 8, 8)), "not of trajectories, N T F C H W"),
        (write(tmp_path / "longer", shape=(3, *theirs.shape[1:])), "has no entry 'prompts_2_data'"),
        (write(tmp_path / "larger", shape=(2, 5, 4, 2, 2, 4)), "bytes, which are not float16"),
        (write(tmp_path / "others", prompts=["rain", "snow"]), "lacks 1 of 2 prompts, as 'snow'"),
    ):
        output = convert(lmdb=folder, out=tmp_path / "out" / folder.name)
        assert output.startswith("error: ") and complaint in output, output
    output = convert(lmdb=write(tmp_path / "good"), times="1,.5")
    assert "5 points a trajectory, and 2 times need 3, with the end" in output, output


def test_an_lmdb_without_its_package_is_told(convert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"")
    assert "pip install lmdb" in convert(lmdb=tmp_path / "lmdb")

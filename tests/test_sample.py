"""Sampling from files: the formats, the noise that belongs to an index, and what is refused."""

import dataclasses
from functools import partial

import jax
import numpy as np
import programs
import pytest
import toys
from PIL import Image

from dmd_jax import sample, weights
from dmd_jax.devices import sharding
from dmd_jax.rollouts import backward_simulation, samplers
from dmd_jax.rollouts.samplers import FewStep, ManyStep, balanced, draw_images, fewer, sampler_for

TIMES = (1.0, 0.75, 0.5, 0.25)
LABELS = balanced(7, 10)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a distilled student of four steps."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    weights.save(path, programs.tiny(), times=TIMES, shift=2.0, step=1, method="dmd")
    return path


@pytest.fixture
def program(call):
    """`call` of `python -m dmd_jax.sample`."""
    return partial(call, sample)


def test_thinned_steps_are_the_student_s_own_where_that_is_possible():
    assert fewer(TIMES, 4) == TIMES
    assert fewer(TIMES, 2) == (1.0, 0.5)
    assert fewer(TIMES, 1) == (1.0,)
    assert fewer(TIMES, 3) == pytest.approx((1.0, 2 / 3, 1 / 3))
    assert fewer((1.0,), 2) == (1.0, 0.5)


def test_calls_are_network_calls():
    assert FewStep(TIMES).calls == FewStep(TIMES).steps == 4
    assert ManyStep(50).calls == 50
    assert ManyStep(50, guidance=1.5).calls == 100


def test_sampler_comes_from_the_file_s_notes(student, teacher):
    assert sampler_for(student) == FewStep(TIMES, 2.0)
    assert sampler_for(student, steps=2, shift=1.0) == FewStep((1.0, 0.5), 1.0)
    assert sampler_for(teacher) == ManyStep(50, 1.0)
    assert sampler_for(teacher, steps=8, guidance=1.5, shift=3.0) == ManyStep(8, 1.5, 3.0)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_shift_that_is_not_above_0_is_refused(request, which):
    with pytest.raises(ValueError, match=r"shift=0.0 must be above 0"):
        sampler_for(request.getfixturevalue(which), shift=0.0)


def test_a_student_refuses_guidance(student):
    with pytest.raises(ValueError, match="guidance is in its weights already; drop"):
        sampler_for(student, guidance=1.5)


def test_a_student_refuses_a_solver(student, teacher):
    with pytest.raises(ValueError, match="solves no ODE: drop --solver=unipc"):
        sampler_for(student, solver="unipc")
    assert sampler_for(teacher, solver="unipc") == ManyStep(50, solver="unipc")


def test_the_name_of_what_is_sampled_is_no_part_of_how_it_is_sampled():
    named = ManyStep(4, 1.5, name="generator")
    assert named.title == "generator, 4 steps"
    assert named == ManyStep(4, 1.5) and repr(named) == repr(ManyStep(4, 1.5))
    # Stored rows of teachers are found by this text.
    assert repr(named) == "ManyStep(steps=4, guidance=1.5, shift=1.0, solver='euler')"


def test_sample_i_is_the_same_at_any_batch_size():
    for sampler in (FewStep(TIMES, 2.0), ManyStep(3, 1.5)):
        whole = draw_images(programs.tiny(), sampler, LABELS)
        assert whole.shape == (7, 28, 28, 1) and whole.dtype == np.uint8
        # Matrix products of other shapes may round otherwise: one grey level, and seldom.
        parts = draw_images(programs.tiny(), sampler, LABELS, batch=3)
        off = np.abs(parts.astype(int) - whole)
        assert off.max() <= 1 and np.mean(off > 0) < 0.01
        few = draw_images(programs.tiny(), sampler, LABELS[:2])
        assert np.abs(few.astype(int) - whole[:2]).max() <= 1


def test_all_samplers_start_from_the_same_noise():
    noises = []

    @dataclasses.dataclass(frozen=True)
    class Spy(samplers.Sampler):
        steps: int
        shift: float = 1.0

        def __call__(self, denoiser, noise, cond, uncond, key, index):
            return noise

    for steps in (1, 4):
        noises.append(draw_images(programs.tiny(), Spy(steps), LABELS, batch=4))
    np.testing.assert_array_equal(*noises)


def test_another_seed_makes_other_images_and_the_same_seed_the_same():
    one, again, other = (
        draw_images(programs.tiny(), FewStep((1.0,)), LABELS, s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != other) > 0.5


def test_the_batch_splits_over_the_devices_of_a_mesh():
    alone = draw_images(programs.tiny(), FewStep(TIMES), LABELS)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=4)):
        spread = draw_images(programs.tiny(), FewStep(TIMES), LABELS)
        one = samplers.FewStep((1.0,))
        rows = np.arange(16, dtype=np.int32)
        result = samplers._batch(
            programs.tiny(), rows % 10, rows % 10, jax.random.key(0), rows, one, (28, 28, 1)
        )
    assert np.abs(spread.astype(int) - alone).max() <= 1
    assert {shard.data.shape for shard in result.addressable_shards} == {(2, 28, 28, 1)}


def test_guidance_moves_samples_away_from_the_unconditional():
    plain, guided, null = (
        draw_images(programs.tiny(), ManyStep(3, w), LABELS).astype(float) for w in (1.0, 2.0, 0.0)
    )
    assert np.abs(guided - null).mean() > np.abs(plain - null).mean() > 0


def test_few_step_is_the_rollout_to_its_last_step():
    denoiser, key, index = toys.affine(0.5, 0.1), jax.random.key(5), np.arange(2)
    noise = jax.random.normal(key, (2, 3))
    how = {"times": TIMES, "shift": 2.0, "schedule": denoiser.schedule, "exit_step": 3}
    result = backward_simulation.backward_simulation(denoiser, noise, None, key, **how)
    x0 = FewStep(TIMES, 2.0)(denoiser, noise, None, None, key, index)
    np.testing.assert_allclose(x0, result.x0, rtol=1e-6)


def test_program_writes_images_and_labels(program, student, tmp_path):
    out = tmp_path / "samples.npz"
    args = "--num=23", "--steps=2", "--seed=3"
    assert program(f"--checkpoint={student}", f"--out={out}", *args) is None
    with np.load(out) as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (23, 28, 28, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(23) % 10)
    wanted = draw_images(weights.denoiser(student), FewStep((1.0, 0.5), 2.0), labels, 3)
    np.testing.assert_array_equal(images, wanted)


def test_program_draws_a_grid_with_a_column_for_each_class(program, teacher, tmp_path):
    out = tmp_path / "samples.png"
    args = "--num=20", "--steps=2", "--guidance=1.5"
    assert program(f"--checkpoint={teacher}", f"--out={out}", *args) is None
    with Image.open(out) as image:
        assert image.size == (10 * 58 - 2, 2 * 58 - 2)  # twice enlarged, two pixels between


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint=nowhere"], "no checkpoint file at 'nowhere'"),
        (["--checkpoint={student}", "--guidance=2"], "guidance is in its weights already"),
        (["--checkpoint={student}", "--out=a.jpg"], "--out=a.jpg: the ending says the format"),
        (["--checkpoint={student}", "--out={student}/a.npz"], "cannot be written to"),
        (["--checkpoint={student}", "--causal=window=6"], "--causal: only a stream takes it"),
        (["--checkpoint={student}", "--shift=nan"], "shift=nan must be above 0"),
        (["--checkpoint={student}", "--fps=nan"], "fps=nan must be above 0"),
    ],
)
def test_program_refuses_with_one_message_before_it_samples(
    program, student, monkeypatch, args, message
):
    monkeypatch.setattr(sample, "draw_images", None)
    output = program(*(arg.format(student=student) for arg in args))
    assert output.startswith("error: ") and message in output


def test_module_runs_as_a_program(student, tmp_path):
    out = tmp_path / "samples.npz"
    ended = programs.python(
        "-m", "dmd_jax.sample", f"--checkpoint={student}", "--num=3", f"--out={out}"
    )
    assert ended.returncode == 0, ended.stderr
    assert out.exists() and str(out) in ended.stdout + ended.stderr


def test_program_splits_a_batch_over_the_cores_of_a_cpu(program, student, monkeypatch, tmp_path):
    devices = []

    def spy(denoiser, sampler, labels, seed):
        devices.append(jax.sharding.get_abstract_mesh().shape.get("data", 1))
        return np.zeros((len(labels), 28, 28, 1), np.uint8)

    monkeypatch.setattr(sample, "draw_images", spy)
    for num in (7, 20, 100):
        assert program(f"--checkpoint={student}", f"--num={num}", f"--out={tmp_path}/a.npz") is None
    assert devices == [1, 2, 8]


def test_a_mesh_of_the_user_divides_the_cpu(monkeypatch):
    sizes = []
    monkeypatch.setattr(sample.cores, "split_cores", lambda *_, mesh, **__: sizes.append(mesh))
    assert sample.mesh(["fsdp=4"], 16).shape["data"] == 2  # of the tests' 8 devices
    assert sample.mesh(["data=8"], 16).shape["data"] == 8
    assert sizes == [(-1, 4), (8,)]

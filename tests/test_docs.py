"""The pages' examples run as they stand, and their numbers are those of the code."""

import ast
import importlib
import re
import shlex
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags

from dmd_jax.diffusion.denoiser import X0, Denoiser, guided
from dmd_jax.diffusion.schedule import FlowMatching, sample_time
from dmd_jax.losses.distribution_matching import dmd_gradient, dmd_loss
from dmd_jax.models.attention import BlockCausal, Causal, TeacherForcing
from dmd_jax.rollouts.samplers import sampler_for
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.run import build
from dmd_jax.training.step import init_state, train_step

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
stop = jax.lax.stop_gradient


def blocks(page):
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def execute(sources, names=None):
    """Runs blocks one after the other, as a notebook does; returns what they define."""
    names = {"__name__": "notebook"} if names is None else names
    for source in sources:
        exec(source, names)
    return names


def rows(page, heading):
    """The cells of the table whose header line starts with `heading`."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def commands(page):
    """(program, its arguments) of every command that a page gives, those of `launch/` included."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    for line in re.findall(
        r"^(?: {4}|\$ )?(?:.*&& )?((?:python -m dmd_jax\.|launch/)\S+ .*)$", text, re.M
    ):
        words = shlex.split(line, comments=True)
        name = words[2] if words[0] == "python" else "dmd_jax.main"
        found.append((name, [word for word in words if word.startswith("--")]))
    return found


@pytest.fixture(scope="module")
def notebook():
    """What docs/teachers.md has defined after the complete example: four blocks."""
    return execute(blocks("docs/teachers.md")[:4])


def test_the_complete_example_distils_its_teacher(notebook):
    near = notebook["share_near_a_centre"]
    before, after = near(notebook["student"]), near(notebook["distilled"])
    assert before < 0.4
    assert after > 0.8
    x0 = notebook["distilled"](
        jax.random.normal(jax.random.key(2), (2000, 2)), jnp.ones(2000), jnp.arange(2000) % 2
    )
    nearest = jnp.argmin(jnp.linalg.norm(x0[:, None] - notebook["CENTRES"], axis=-1), axis=1)
    # Every centre is found, none twice as often as another.
    shares = jnp.bincount(nearest, length=4) / 2000
    assert shares.min() > 0.17 and shares.max() < 0.34


def test_the_complete_examples_formula_is_the_exact_denoiser(notebook):
    """Against the mean of x0 given x_t, estimated from draws of the mixture."""
    component, noise, eps = jax.random.split(jax.random.key(3), 3)
    draws = 200_000
    x0 = notebook["CENTRES"][2 * jax.random.randint(component, (draws,), 0, 2)]
    x0 += notebook["SPREAD"] * jax.random.normal(noise, (draws, 2))
    x_t = FlowMatching().add_noise(x0, jax.random.normal(eps, (draws, 2)), jnp.full(draws, 0.5))
    at = jnp.array([[0.3, -0.2]])
    weight = jnp.exp(-jnp.sum((x_t - at) ** 2, axis=-1) / (2 * 0.05**2))
    wanted = jnp.sum(weight[:, None] * x0, axis=0) / jnp.sum(weight)
    found = notebook["teacher"](at, jnp.array([0.5]), jnp.array([0]))[0]
    # Some 1,000 draws are that near: four standard errors, and the width of the window.
    np.testing.assert_allclose(found, wanted, atol=0.15)


def test_a_linen_model_is_a_teacher(notebook):
    *_, linen, _, _ = blocks("docs/teachers.md")
    names = execute([linen], dict(notebook))
    inputs = jnp.ones((4, 2)), jnp.full(4, 0.5), names["labels"]
    found = names["teacher"](*inputs)
    raw = names["model"].apply(names["variables"], *inputs)
    np.testing.assert_allclose(found, 1.0 - 0.5 * raw, rtol=1e-6)


def test_a_family_of_ones_own_is_saved_sampled_and_converted(notebook, tmp_path, monkeypatch):
    from dmd_jax import weights

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(weights.FAMILIES, "conv", None)  # taken out after the test
    names = execute(blocks("docs/teachers.md")[-2:], dict(notebook))
    assert names["images"].shape == (6, 8, 8, 1) and names["images"].dtype == np.uint8
    converted = weights.denoiser(names["path"])
    # Their second convolution is all ones and the rest zeros: silu(t / 1000 * 0) is zero too.
    np.testing.assert_array_equal(converted.net.last.kernel[...], np.ones((3, 3, 16, 1)))
    np.testing.assert_array_equal(converted.net.label.embedding[...], np.zeros((4, 16)))
    weights.sharding_rules(converted.net)


def test_a_family_of_ones_own_is_the_teacher_of_a_run(notebook, tmp_path, monkeypatch, data_dir):
    """By the config program of docs/teachers.md, for digits."""
    from dmd_jax import weights

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(weights.FAMILIES, "conv", None)  # taken out after the test
    names = execute(blocks("docs/teachers.md")[-2:-1], dict(notebook))
    net = names["Conv"](names["ConvConfig"](28, 1, 10, width=4), rngs=names["nnx"].Rngs(0))
    weights.save(tmp_path / "digits.safetensors", Denoiser(net))
    page = (ROOT / "docs/teachers.md").read_text()
    source = re.search(r"^    import my_network.*?return config$", page, re.M | re.S)[0]
    monkeypatch.syspath_prepend(ROOT)
    source = textwrap.dedent(source).replace("import my_network", "")
    config = execute([source.replace("conv", str(tmp_path / "digits"))])["get_config"]()
    config.data.name, config.data.data_dir = "mnist5k", data_dir
    run = build(config, jax.devices()[:1])
    assert type(run.frozen["teacher"].net) is names["Conv"]


def test_the_method_in_the_docs_learns(notebook):
    """The regression of docs/methods.md, with the teacher and the student of docs/teachers.md."""
    method = execute(blocks("docs/methods.md"))["Regression"](sample_shape=(2,), steps=4)
    nets, frozen = {"generator": notebook["student"]}, {"teacher": notebook["frozen"]["teacher"]}
    tx = per_role({"generator": AdamW(learning_rate=3e-3).transform(200)})
    step = jax.jit(partial(train_step, method=method, tx=tx, update_generator=True))
    state, key, errors = init_state(nets, tx), jax.random.key(0), []
    for _ in range(200):
        state, metrics = step(state, frozen, notebook["batch"], key)
        errors.append(float(metrics["regression/error"]))
    assert np.mean(errors[-10:]) < 0.4 * errors[0]


def test_readmes_ten_lines_run(tmp_path, monkeypatch):
    """With a small network in place of the shipped teacher, and a few steps."""
    from dmd_jax import weights
    from dmd_jax.models.dit import DiTConfig

    config = DiTConfig(
        image_size=28, channels=1, num_classes=10, patch=14, dim=16, depth=1, heads=2
    )
    small = Denoiser(weights.build(config))
    monkeypatch.setattr(weights, "denoiser", {"mnist_teacher": small}.__getitem__)
    monkeypatch.chdir(tmp_path)
    [source] = blocks("README.md")
    shorter = source.replace("range(1000)", "range(6)")
    assert shorter != source
    names = execute([shorter])
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), names["student"], small)
    assert max(jax.tree.leaves(moved)) > 0
    assert all(jnp.all(jnp.isfinite(value)) for value in jax.tree.leaves(names["student"]))
    assert sampler_for(tmp_path / "student.safetensors").calls == 4


def test_guidance_table_agrees_with_guided():
    """Each project's formula at its example equals ours at the w that the table gives."""
    table = rows("docs/guidance.md", "| where |")
    c, u = jnp.array([[0.7, -1.1]]), jnp.array([[0.2, 0.4]])

    def denoiser(x_t, t, cond):
        return jnp.where(cond[:, None] == 1, c, u)

    for where, _, formula, w, example in table:
        s, wanted = (float(number) for number in example.split(" → "))
        assert evaluate(w, s=s) == wanted, where
        theirs = evaluate(formula, s=s, c=c, u=u)
        ours = guided(denoiser, c, jnp.ones(1), jnp.ones(1), jnp.zeros(1), wanted)
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, err_msg=where)
    assert len(table) > 10


def evaluate(expression, **names):
    """The value of a table's formula, such as `c + s * (c - u)`."""
    return eval(compile(ast.parse(expression.strip("`"), mode="eval"), "table", "eval"), names)


def test_mathematics_table_of_the_normaliser():
    """Exact factor, 1 / n and their quotient for unit Gaussian data and its exact denoiser."""
    schedule, count = FlowMatching(), 200_000
    x0, eps = jax.random.normal(jax.random.key(0), (2, count))
    for cells in rows("docs/mathematics.md", "| t |"):
        t, exact, normaliser, weight = map(float, cells)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = schedule.add_noise(x0, eps, jnp.full(count, t))
        real = alpha * x_t / (alpha**2 + sigma**2)
        unit = dmd_gradient(x0[None], real[None], real[None] + 1.0)  # (f - r) = 1: it is 1 / n
        np.testing.assert_allclose((alpha / sigma) ** 2, exact, rtol=6e-3)
        np.testing.assert_allclose(unit[0, 0], normaliser, rtol=1e-2)
        np.testing.assert_allclose(normaliser / (alpha / sigma) ** 2, weight, rtol=2e-2)


def test_mathematics_table_of_bfloat16():
    def published(x0, grad):
        return 0.5 * jnp.mean(jnp.square(x0 - stop(x0 - grad.astype(x0.dtype))))

    for x0, grad, *arrives in (map(float, row) for row in rows("docs/mathematics.md", "| x0 | g")):
        x = jnp.full(8, x0, jnp.bfloat16)
        for loss, wanted in zip((published, dmd_loss), arrives, strict=True):
            found = 8 * jax.grad(loss)(x, jnp.full(8, grad)).astype(jnp.float32)
            # Our column is printed to three digits; 8 bits are good for 1 in 256.
            np.testing.assert_allclose(found, wanted, rtol=4e-3)


def test_mathematics_numbers_of_rounding():
    """The percentages of "Why float64 is not needed" and of "What no precision repairs"."""
    keys, count = jax.random.split(jax.random.key(0), 5), 100_000
    x0, step, error, apart, gap = (jax.random.normal(key, (count,)) for key in keys)

    def wrong(found, wanted):
        return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))

    def arrives(loss, x0, grad):
        return count * jax.grad(loss)(x0, grad).astype(jnp.float32)

    def detour(x0, grad):
        return 0.5 * jnp.mean(jnp.square(x0 - stop(x0 - grad.astype(x0.dtype))))

    grad, short = 0.003 * step, x0.astype(jnp.bfloat16)
    assert abs(wrong(arrives(detour, short, grad), grad) - 0.49) < 0.01
    assert abs(wrong(arrives(dmd_loss, short, grad), grad) - 0.0017) < 1e-4
    assert wrong(arrives(detour, x0, grad), grad) < 1.5e-5

    def gradient(cond, uncond, fake, x0):
        real = uncond + 4.0 * (cond - uncond)
        return (fake - real) / jnp.mean(jnp.abs(x0 - real))

    cond = x0 + 0.1 * error
    uncond = cond + 0.05 * apart
    values = (cond, uncond, uncond + 4.0 * (cond - uncond) + 0.03 * gap, x0)
    exact = gradient(*values)
    rounded = [value.astype(jnp.bfloat16) for value in values]
    short = gradient(*rounded).astype(jnp.float32)
    assert abs(wrong(short, exact) - 0.29) < 0.01
    assert abs(wrong(gradient(*(v.astype(jnp.float32) for v in rounded)), exact) - 0.29) < 0.01


def test_mathematics_numbers_of_time_sampling():
    t = sample_time(jax.random.key(0), (400_000,), shift=5.0)
    assert abs(float(jnp.mean(t == 0.98)) - 0.093) < 2e-3
    assert abs(float(jnp.mean(t == 0.02)) - 0.004) < 5e-4
    assert abs(float(jnp.median(t)) - 0.83) < 5e-3
    assert abs(float(jnp.mean(t)) - 0.75) < 5e-3


def test_causal_start_table_of_the_blur():
    """What x_t of the first of two frames does not tell about the end of the exact ODE."""
    values, vectors = np.linalg.eigh(np.array([[1.0, 0.9], [0.9, 1.0]]))

    def of(values):
        return vectors @ np.diag(values) @ vectors.T

    table = rows("docs/causal_start.md", "| t |")
    for t, lost, _ in (map(float, cells) for cells in table):
        at_t = (1 - t) ** 2 * values + t**2  # the variances of x_t = S^(1/2) eps
        shared = of(np.sqrt(values * at_t))[0, 0]
        assert lost == pytest.approx(1 - shared**2 / of(at_t)[0, 0], abs=6e-4)
    assert len(table) == 4


def test_causal_start_numbers_of_attention():
    """Pairs of a packed pass over those of a bidirectional one, for 21 frames."""
    for size, wanted in ((1, 1.05), (3, 1.14)):
        mask = TeacherForcing(BlockCausal(Causal(size)), 21)
        index = np.arange(42)
        pairs = mask.allows(index[:, None], index[None]).sum()
        assert pairs / 21**2 == pytest.approx(wanted, abs=5e-3)


def test_the_normaliser_bounds_the_gradient():
    """mean |g| <= 1 + mean |x0 - f| / mean |x0 - r|, the claim of docs/mathematics.md."""
    x0, real, fake = jax.random.normal(jax.random.key(0), (3, 64, 50))
    grad = jnp.mean(jnp.abs(dmd_gradient(x0, real, fake)), axis=1)
    errors = [jnp.mean(jnp.abs(x0 - guess), axis=1) for guess in (fake, real)]
    assert jnp.all(grad <= 1.0 + errors[0] / errors[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_point_at_what_exists(page):
    """Links, programs, configs and paths of the repository that a page names."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"python -m (dmd_jax\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for config in re.findall(r"--config=(\S+?\.py)", text):
        assert (ROOT / config).exists(), config
    for path in re.findall(r"`((?:dmd_jax|tests)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_guidance_table_of_passes():
    """The passes column of docs/guidance.md."""
    for w, _, passes in rows("docs/guidance.md", "| `w` | what"):
        weight = 2.0 if w == "more than 1" else float(w)
        calls = []

        def net(x, t, cond, calls=calls):
            calls.append(x.shape[0])
            return x

        denoiser = Denoiser(jax.tree_util.Partial(net), prediction=X0())
        guided(denoiser, jnp.ones((1, 2)), jnp.ones(1), jnp.ones(1), jnp.zeros(1), weight)
        assert sum(calls) == int(passes)


def test_the_example_of_sampling_videos_runs(tmp_path, monkeypatch):
    """With a small network in place of the shipped teacher."""
    from dmd_jax import weights
    from dmd_jax.data import moving_digits, word_vectors
    from dmd_jax.models.wan import WanConfig

    channels = moving_digits.FOLD**2
    config = WanConfig(16, 16, 2, 1, channels, channels, word_vectors.DIM)
    path = tmp_path / "teacher.safetensors"
    weights.save(path, Denoiser(weights.build(config)), data="moving_digits")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    [source] = blocks("docs/wan.md")
    names = execute([source.replace("moving_digits_teacher", str(path))])
    assert {file.name for file in names["folder"].iterdir()} == {"0.gif", "1.gif"}
    assert names["video"].shape == (moving_digits.FRAMES, *2 * [moving_digits.SIZE], 3)


def test_the_example_of_a_stream_runs(capsys):
    """With the shipped student."""
    [source] = blocks("docs/streaming.md")
    names = execute([source])
    assert names["after"].block == 4 and names["after"].frames.shape == (3, 36, 36, 3)
    assert "frames per second (denoising" in capsys.readouterr().out


COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    "page, name, arguments",
    COMMANDS,
    ids=[f"{page.stem}-{name.split('.')[1]}-{i}" for i, (page, name, _) in enumerate(COMMANDS)],
)
def test_every_command_of_a_page_has_flags_that_exist(
    page, name, arguments, command_line, monkeypatch
):
    monkeypatch.chdir(ROOT)
    program = importlib.import_module(name)
    command_line(*arguments)
    program.define_flags()
    app.parse_flags_with_usage(["program", *arguments])
    if name == "dmd_jax.main":
        flags.FLAGS.config.lock()  # reads the config, and applies the overrides


def test_the_pages_commands_are_found():
    """So that the test above cannot pass by finding none."""
    names = {name for _, name, _ in COMMANDS}
    known = "main plan sample evaluate embed encode ode_pairs export metric_network stream"
    assert names == {f"dmd_jax.{command}" for command in known.split()}

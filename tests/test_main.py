"""The entry point: what it prints and sets, and how its process ends."""

import textwrap

import jax
import programs
import pytest

import dmd_jax
from dmd_jax import main
from dmd_jax.devices.paths import path_name
from dmd_jax.methods.sid import SiD
from dmd_jax.training import loop


def test_dry_run_prints_every_role_and_computes_nothing(start, capsys, teacher, data_dir, tmp_path):
    values = programs.short(teacher, data_dir)
    assert start(*programs.flags(tmp_path / "run", values), "--dry_run") is None
    table = capsys.readouterr().out
    for role in ("generator", "fake_score", "teacher"):
        assert f"{role:<12}{16_100:>14,}" in table
    assert "one checkpoint: 0.4 MiB" in table
    assert not (tmp_path / "run").exists()


def test_flags_choose_the_method_and_the_optimizer(start, teacher, data_dir, tmp_path, monkeypatch):
    recorded = []
    monkeypatch.setattr(main, "describe", lambda run: recorded.append(run))
    chosen = {"method.cls": "SiD", "generator.optimizer.cls": "Muon"}
    values = programs.short(teacher, data_dir, **chosen)
    assert start(*programs.flags(tmp_path / "run", values), "--dry_run") is None
    [run] = recorded
    assert type(run.method) is SiD
    assert any(
        "/muon/" in path_name(path)
        for path, _ in jax.tree.leaves_with_path(run.state_shape().opt_state)
    )


def test_workdir_is_named_after_the_config_and_its_argument(start, monkeypatch):
    recorded = []
    monkeypatch.setattr(main, "build", lambda config, **_: exit(recorded.append(main.workdir())))
    for config in ("configs/dmd.py", "configs/dmd.py:one_step"):
        start(f"--config={config}")
    assert [str(path) for path in recorded] == ["runs/dmd", "runs/dmd_one_step"]


def test_a_tilde_in_a_path_is_the_home_directory(start, monkeypatch):
    recorded = []
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(
        main, "build", lambda config, **_: exit(recorded.append((main.workdir(), config)))
    )
    paths = {"data.data_dir": "~/data", "teacher.weights": "~/t.safetensors"}
    start(*programs.flags("~/runs/x", paths))
    [(workdir, config)] = recorded
    assert str(workdir) == "/home/me/runs/x"
    assert config.data.data_dir == "/home/me/data"
    assert config.teacher.weights == "/home/me/t.safetensors"


def test_version_is_printed_without_a_config(start, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert start("--version") is None
    assert capsys.readouterr().out == f"dmd_jax {dmd_jax.__version__}\n"


def test_a_stated_mesh_decides_how_many_devices_a_cpu_has(teacher, data_dir, tmp_path):
    """In a process of its own: devices are counted once."""
    values = {"mesh.data": 2, "mesh.fsdp": 3, "batch_size": 48}
    values = programs.short(teacher, data_dir, **values)
    ended = programs.python("-m", "dmd_jax.main", *programs.flags(tmp_path, values), "--dry_run")
    assert ended.returncode == 0, ended.stderr
    assert "devices: 6 (cpu)" in ended.stdout


@pytest.mark.parametrize("failing", ["build", "describe", "train"])
def test_too_little_memory_is_told_with_what_to_do(
    failing, start, monkeypatch, teacher, data_dir, tmp_path
):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 3 GiB\nfrom 0x1")

    monkeypatch.setattr(loop if failing == "train" else main, failing, fail)
    output = start(*programs.flags(tmp_path / "run", programs.short(teacher, data_dir)))
    assert output.startswith(
        "error: the memory of the device is too small (JaxRuntimeError: RESOURCE"
    )
    assert "config.accumulate" in output and len(output.splitlines()) == 1


@pytest.mark.parametrize("dtype, precision", [("float32", "float32"), ("bfloat16", None)])
def test_float32_means_float32_where_all_networks_compute_in_it(
    dtype, precision, start, teacher, data_dir, tmp_path
):
    values = programs.short(teacher, data_dir, **{"teacher.compute.dtype": dtype})
    assert start(*programs.flags(tmp_path / "run", values), "--dry_run") is None
    assert jax.config.jax_default_matmul_precision == precision


LEAVING = """
    import atexit, contextlib, os, sys, threading, types
    from dmd_jax import main
    from dmd_jax.training import loop

    def train(run, workdir, profile):
        started = threading.Event()

        def compile(kind):
            started.set()
            threading.Event().wait()  # for ever

        loop.in_background(compile, [True])
        started.wait()
        exec(way)

    main.build = main.describe = lambda *_, **__: types.SimpleNamespace(mesh=None)
    main.jax.set_mesh = contextlib.nullcontext
    loop.train = train
    _, folder, *ways = sys.argv
    for way in ways:  # a process for each, which finds everything imported
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for stream in (1, 2):
            file = os.open(f"{folder}/{ways.index(way)}.{stream}", os.O_CREAT | os.O_WRONLY)
            os.dup2(file, stream)
        sys.argv = ["main"]
        atexit.register(print, "what a slow end does")
        sys.exit(main.start())
"""

ENDS = {
    "pass": (0, ""),
    "raise main.Stopped('saved')": (75, ""),
    "raise ValueError('no')": (1, "error: no"),
    "raise KeyboardInterrupt": (130, "goes on from its last checkpoint"),
    "raise RuntimeError('a bug')": (1, "RuntimeError: a bug"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{way to end: (exit code, stdout, stderr) of a process that compiles for ever}."""
    folder = tmp_path_factory.mktemp("ended")
    parent = programs.python("-c", textwrap.dedent(LEAVING), folder, *ENDS)
    assert parent.returncode == 0, parent.stderr
    codes = map(int, parent.stdout.split())
    written = [[(folder / f"{i}.{n}").read_text() for n in (1, 2)] for i in range(len(ENDS))]
    return {way: (code, *texts) for way, code, texts in zip(ENDS, codes, written, strict=True)}


@pytest.mark.parametrize("way", ENDS)
def test_the_end_waits_for_no_compilation(way, ended):
    """A compilation that never ends: the process does."""
    (code, stdout, stderr), (wanted, message) = ended[way], ENDS[way]
    assert code == wanted, stderr
    assert stderr.strip().endswith(message)
    assert ("Traceback" in stderr) == ("bug" in message)
    assert "slow" not in stdout


def test_a_disk_that_fills_in_mid_run_is_told_in_one_line(
    start, monkeypatch, teacher, data_dir, tmp_path
):
    def train_until_full(run, workdir, *_):
        raise OSError(28, "No space left on device", str(workdir / "metrics.jsonl"))

    monkeypatch.setattr(loop, "train", train_until_full)
    output = start(*programs.flags(tmp_path / "run", programs.short(teacher, data_dir)))
    assert output == f"error: [Errno 28] No space left on device: '{tmp_path}/run/metrics.jsonl'"


def test_help_tells_of_the_flags(start, capsys):
    start("--helpfull")
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in ("config", "workdir", "[no]dry_run"))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("method.guidanc", 2, "guidance"),  # refused by the parser
        ("generator.optimizer.decay", "never", "use 'constant', 'linear' or 'cosine'"),  # by build
    ],
)
def test_a_process_that_refuses_says_so_once_and_exits_with_an_error(
    teacher, data_dir, tmp_path, name, value, message
):
    values = programs.short(teacher, data_dir, **{name: value})
    ended = programs.python("-m", "dmd_jax.main", *programs.flags(tmp_path / "run", values))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if message in line] == [
        ended.stderr.splitlines()[-1]
    ]
    assert ended.stderr.splitlines()[-1].startswith("error: ")

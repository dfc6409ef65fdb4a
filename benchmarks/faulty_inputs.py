"""Mistakes in commands, configs and files, given to the programs of this library in this process.

Used by faults.py. A mistake is a program, its arguments and the files that it reads; `KINDS` has a
function for each kind, and a seed decides which field, which value, which byte. The programs run up
to the point at which they would compute. Each must say in a sentence what is wrong, or accept what
it got, and change no file that it read.
"""

import collections
import contextlib
import functools
import importlib
import io
import random
import shutil
import sys
import traceback

import jax
from absl import app, flags
from faulty_files import (
    FLAG_VALUES,
    NUMBERS,
    REALS,
    ROOT,
    TUPLES,
    VALUES,
    good_files,
    load_config,
    misspelt,
    spoil,
    spoil_bytes,
    trained_by,
)
from jax.extend.backend import clear_backends

from dmd_jax import main
from dmd_jax.training import loop
from dmd_jax.training.configuration import PROGRAM, flatten
from dmd_jax.training.run import Run

FLAGS = flags.FLAGS
CONFIGS = (
    *("dmd.py", "dmd.py:one_step", "dmd.py:any_step", "dmd.py:dmd1", "dmd.py:sid", "dmd.py:dmd2"),
    *("dmd.py:f_distill", "dmd.py:reward", "dmd.py:decoupled", "dmd.py:phased", "dmd.py:tdm"),
    *("dmd.py:sida", "dmd.py:consistency", "dmd.py:scm", "dmd.py:meanflow", "dmd.py:rcm"),
    *("dmd.py:lora", "dmd.py:wan_tiny", "pretrain.py", "pretrain.py:wan_small"),
    *("pretrain.py:bouncing_causal", "self_forcing.py", "self_forcing.py:frame"),
    *("self_forcing.py:consistency", "self_forcing.py:teacher_forcing"),
)


class Began(BaseException):
    """The program would compute now: it has accepted its input."""


def began(*_, **__):
    raise Began


# Where the programs begin to compute, networks loaded. Compilation in the background is left out.
COMPUTES = (
    ("training.loop", "_loop"),
    ("training.loop", "_finish"),
    ("sample", "draw_images"),
    ("sample", "play"),
    ("pipelines.sampling", "draw"),
    ("evaluate", "real_row"),
    ("pipelines.precompute", "embed"),
    ("pipelines.ode_pairs", "_solve"),
    ("pipelines.server", "serve"),
    ("quality.metric_network", "write"),
    ("plan", "plan"),
)


@functools.cache
def fields(path):
    """{name: value} of the entries of a config."""
    return flatten(load_config(path))


# The kinds of mistakes: (rng, folder with good files) -> (program, arguments).


def overridden(rng, folder, name, value, path="dmd.py"):
    given = [f"--config=configs/{path}", f"--config.{name}={value}"]
    return "main", [*given, f"--workdir={folder}/new"]


def typo(rng, folder):
    """A misspelt field of a config."""
    path = rng.choice(CONFIGS)
    name = rng.choice(sorted(fields(path))).split(".")
    at = rng.randrange(len(name))
    name[at] = misspelt(rng, name[at])
    return overridden(rng, folder, ".".join(name), rng.choice(("1", "0.5", "x")), path)


def value(rng, folder):
    """A wrong value of a field."""
    path = rng.choice(CONFIGS)
    name = rng.choice(sorted(fields(path)))
    return overridden(rng, folder, name, rng.choice(VALUES), path)


def numbers(rng, folder):
    """Values of the right type, but perhaps of the wrong size, of one or two fields."""
    path = rng.choice(CONFIGS)
    known = {bool: ("True", "False"), int: NUMBERS, float: REALS, list: TUPLES}
    typed = [name for name, old in fields(path).items() if type(old) in known]
    args = [
        f"--config.{name}={rng.choice(known[type(fields(path)[name])])}"
        for name in rng.choices(typed, k=rng.choice((1, 1, 2)))
    ]
    return "main", [f"--config=configs/{path}", f"--workdir={folder}/new", *args]


def command(rng, folder):
    """A wrong config, variant, argument or flag of the training program."""
    wrong = rng.choice(
        (
            [f"--config=configs/{misspelt(rng, rng.choice(CONFIGS))}"],
            ["--config=configs/dmd.py", misspelt(rng, "--dry_run")],
            ["--config=configs/dmd.py", "--dry_run", "config.steps=3"],
            ["--config=configs"],
            ["--config=README.md"],
            ["--config="],
            ["--config=configs/dmd.py", f"--profile={rng.choice(VALUES)}"],
            ["--config=configs/dmd.py", f"--workdir={folder}/student.safetensors"],
            ["--config=configs/dmd.py", f"--workdir={folder}/student.safetensors/run"],
            ["--config=configs/dmd.py", "--workdir=/proc/run"],
            ["--config=configs/dmd.py", "--config.steps"],
            ["--config=configs/dmd.py", "--config.method=DMD"],
            ["--config=configs/dmd.py", f"--config.method.cls={rng.choice(VALUES)}"],
            ["--config=configs/dmd.py", f"--config.generator.optimizer.cls={rng.choice(VALUES)}"],
        )
    )
    return "main", [f"--workdir={folder}/new", *wrong]


CONFIG = """
import ml_collections
from dmd_jax.data import Prompts
from dmd_jax.training.configuration import complete
import importlib.util
spec = importlib.util.spec_from_file_location("dmd", "{root}/configs/dmd.py")
dmd = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dmd)

def get_config(arg=""):
    config = dmd.get_config("wan_tiny")
    with config.unlocked():
        config.data = dict(cls=Prompts, embeddings="{folder}/embeddings", sample_shape=(3, 4, 4, 4))
        for role in ("teacher", "generator", "fake_score"):
            config[role].weights = "{folder}/video.safetensors"
    return complete(config)
"""


def written(folder):
    """Writes a config program that trains on the embeddings in `folder`; returns its flags."""
    path = folder / "program.py"
    path.write_text(CONFIG.format(root=ROOT, folder=folder))
    return [f"--config={path}", "--config.batch_size=2", f"--workdir={folder}/new"]


def program(rng, folder):
    """An error in a config program: a line missing, a word misspelt, a value replaced."""
    written(folder)
    path = folder / "program.py"
    lines = path.read_text().splitlines()
    at = rng.randrange(1, len(lines))
    how = rng.randrange(3)
    if how == 0:
        del lines[at]
    elif how == 1 and lines[at].split():
        word = rng.choice(lines[at].split())
        lines[at] = lines[at].replace(word, misspelt(rng, word), 1)
    else:
        lines[at] = lines[at].replace("=", rng.choice((" ", "=-", "=None,")), 1)
    path.write_text("\n".join(lines))
    return "main", [f"--config={path}", f"--workdir={folder}/new"]


def trained(rng, folder):
    """Spoilt weights of a role, or of the feature network."""
    name = rng.choice(("teacher", "generator", "fake_score"))
    file = rng.choice(("teacher.safetensors", "video.safetensors", "wan", "wan.pt"))
    if file == "teacher.safetensors" or rng.random() < 0.7:
        spoil(rng, folder / file)
    config = ["--config=configs/dmd.py", f"--workdir={folder}/new", "--config.batch_size=8"]
    good = [f"--config.teacher.weights={folder}/student.safetensors"] if name != "teacher" else []
    return "main", [*config, *good, f"--config.{name}.weights={folder / file}"]


def resumed(rng, folder):
    """A run's folder with a spoilt file."""
    if rng.random() < 0.3:
        shutil.rmtree(folder / "run" / "checkpoints")
    else:
        spoil(rng, folder / "run")
    return "main", trained_by(folder)


def judged(rng, folder):
    """A spoilt feature network."""
    shutil.copy(ROOT / "dmd_jax" / "assets" / "mnist_metric.safetensors", folder / "f.safetensors")
    spoil(rng, folder / "f.safetensors")
    if rng.random() < 0.5:
        return "evaluate", [
            f"--checkpoint={folder}/student.safetensors",
            f"--features={folder}/f.safetensors",
        ]
    return overridden(rng, folder, "evaluate.features", folder / "f.safetensors")


def prompted(rng, folder):
    """Spoilt embeddings of prompts, or latents."""
    args = written(folder)
    if rng.random() < 0.5:
        spoil(rng, folder / "embeddings")
    else:
        spoil(rng, folder / "latents")
        args.append(f"--config.data.latents={folder}/latents")
    return "main", args


def traced(rng, folder):
    """Spoilt embeddings or latents for the program that solves a teacher's ODE."""
    spoil(rng, folder / rng.choice(("embeddings", "latents", "video.safetensors")))
    checkpoint = f"--checkpoint={folder}/{rng.choice(('video.safetensors', 'wan'))}"
    given = [f"--{name}={folder}/{name}" for name in ("embeddings", "latents")]
    return "ode_pairs", [checkpoint, *given, f"--out={folder}/pairs", "--frames_per_block=1"]


def sampled(rng, folder):
    """A spoilt network, sampled, judged, exported or streamed."""
    file = rng.choice(("student.safetensors", "video.safetensors", "wan", "wan.pt"))
    spoil(rng, folder / file)
    checkpoint = f"--checkpoint={folder / file}"
    prompts = [f"--prompts={folder}/prompts.txt"] if "student" not in file else []
    return rng.choice(
        (
            ("sample", [checkpoint, f"--out={folder}/a.png", *prompts]),
            ("evaluate", [checkpoint]),
            ("export", [checkpoint, "--to=original", f"--out={folder}/out"]),
            ("export", [checkpoint, "--to=diffusers", f"--out={folder}/out"]),
            ("stream", [checkpoint]),
        )
    )


USUAL = {
    "sample": {"checkpoint": "{folder}/student.safetensors", "out": "{folder}/a.png"},
    "evaluate": {"checkpoint": "{folder}/student.safetensors"},
    "export": {
        "checkpoint": "{folder}/video.safetensors",
        "to": "diffusers",
        "out": "{folder}/out",
    },
    "embed": {
        "prompts": "{folder}/prompts.txt",
        "checkpoint": "{folder}/wan",
        "out": "{folder}/out",
    },
    "encode": {
        "videos": "{folder}",
        "checkpoint": "{folder}/wan",
        "embeddings": "{folder}/embeddings",
        "out": "{folder}/out",
    },
    "ode_pairs": {
        "checkpoint": "{folder}/video.safetensors",
        "embeddings": "{folder}/embeddings",
        "latents": "{folder}/latents",
        "out": "{folder}/out",
        "frames_per_block": "1",
    },
    "stream": {"checkpoint": "bouncing_student"},
    "metric_network": {"out": "{folder}/metric.safetensors"},
    "plan": {"config": "configs/dmd.py", "topology": "cpu:1"},
}
EXTRA = {
    "sample": ("steps", "guidance", "shift", "solver", "mesh", "num", "out", "prompts", "frames"),
    "evaluate": ("steps", "guidance", "shift", "num", "data", "split", "data_dir", "features"),
    "export": ("to", "dtype", "shift", "base", "out"),
    "embed": ("tokenizer", "batch", "length", "negative"),
    "encode": ("frames", "height", "width", "fps"),
    "ode_pairs": ("times", "shift", "steps", "guidance", "frames_per_block", "window", "sink"),
    "stream": ("steps", "shift", "causal", "frames", "fps", "port", "host", "pipeline"),
    "metric_network": ("data", "data_dir", "steps", "batch", "seed", "out"),
    "plan": ("topology", "slices", "search", "json"),
}


def flag(rng, folder):
    """A wrong value of a flag, or a misspelt flag, of a program that is not training."""
    program = rng.choice(sorted(USUAL))
    given = {name: text.format(folder=folder) for name, text in USUAL[program].items()}
    name = rng.choice((*USUAL[program], *EXTRA[program], *EXTRA[program]))
    if rng.random() < 0.2:
        given[misspelt(rng, name)] = given.pop(name, "1")
    else:
        given[name] = rng.choice(FLAG_VALUES)
    if program == "sample" and rng.random() < 0.5:
        given = {
            "checkpoint": "moving_digits_teacher",
            "prompts": f"{folder}/prompts.txt",
            "out": f"{folder}/a.gif",
        } | given
    return program, [f"--{name}={text}" for name, text in given.items()]


def texts(rng, folder):
    """A bad file of prompts."""
    path = folder / "prompts.txt"
    path.write_bytes(
        rng.choice(
            (
                b"",
                b"\n \n\t\n",
                "ein schöner Tag\n".encode("latin-1"),
                "a slow three\n".encode("utf-16"),
                rng.randbytes(200),
                b"\0\0\0",
                b"120: a fast seven\n",
                b"a slow three\n120: a\n60: b\n",
                b"a slow three\n0: a\n",
                b"a slow three\n99999999999999999999: a\n",
                b"a slow three\n120:\n",
                b"-1: a slow three\n",
                b"xyzzy quux\n",
                b"a slow three " * 300,
                b"a slow three\r\na fast seven\r\n",
                (folder / "student.safetensors").read_bytes(),
            )
        )
    )
    if rng.random() < 0.2:
        spoil_bytes(rng, path)
    sample = ["--checkpoint=moving_digits_teacher", f"--prompts={path}", f"--out={folder}/a.gif"]
    stream = ["--checkpoint=bouncing_student", "--stream", *sample[1:]]
    embed = [f"--prompts={path}", f"--checkpoint={folder}/wan", f"--out={folder}/out"]
    return rng.choice((("sample", sample), ("sample", stream), ("embed", embed)))


KINDS = (
    *(typo, value, numbers, numbers, numbers, command, program, trained, judged, prompted),
    *(prompted, traced, sampled, sampled, resumed, flag, flag, texts),
)
LOADING = (trained, prompted, resumed)  # kinds whose mistakes show when networks are loaded


# The programs.


def call(program, args, known):
    """Runs a program up to the point at which it would compute.

    Returns:
        ("refused", what it said), ("accepted", ""), or ("broke", a traceback).
    """
    for name in set(FLAGS) - known:
        delattr(FLAGS, name)
    FLAGS.unparse_flags()
    sys.modules.pop(PROGRAM, None)  # or it keeps what the last config program defined
    module = importlib.import_module(f"dmd_jax.{program}")
    sys.argv, said = [program, *args], io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if hasattr(module, "start"):
                module.start()
            else:
                module.define_flags()
                app.run(module.main)
    except Began:
        return "accepted", ""
    except SystemExit as end:
        if end.code in (None, 0):
            return "accepted", ""
        text = end.code if isinstance(end.code, str) else said.getvalue()
        return ("broke" if "Traceback" in text or not text.strip() else "refused"), text
    except BaseException:
        return "broke", traceback.format_exc()
    return "accepted", ""


WRITTEN = ("lock", "config.json", "metrics.jsonl")  # by a run that goes on


def contents(folder):
    """{path: its bytes} of the files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def altered(before, after, outcome):
    """The files that a program changed or removed, apart from what a run that goes on writes."""
    changed = [path for path, content in before.items() if after.get(path) != content]
    if outcome != "accepted":
        return changed
    kept = set(after.values())  # a damaged checkpoint is moved
    return [path for path in changed if path.name not in WRITTEN and before[path] not in kept]


def campaign(folder, seed, count):
    """Makes `count` mistakes; returns a list of what is wrong, and writes all into mistakes.txt."""
    clear_backends()  # kills and damage, if they came before, had one device
    jax.config.update("jax_num_cpu_devices", 2)
    for flag in FLAGS.get_flags_for_module(sys.argv[0]):  # the programs have some of these names
        delattr(FLAGS, flag.name)
    app.define_help_flags()
    known = set(FLAGS)
    good = folder / "good"
    good.mkdir()
    good_files(good)
    for module, name in COMPUTES:
        setattr(importlib.import_module(f"dmd_jax.{module}"), name, began)
    loop.compile_steps = lambda run: {}
    describe, start = main.describe, Run.start
    outcomes, wrong = collections.Counter(), []
    with (folder / "mistakes.txt").open("w") as record:
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            here = folder / f"mistake_{number}"
            shutil.copytree(good, here)
            kind = rng.choice(KINDS)
            # Tracing a step and loading networks take seconds.
            main.describe = describe if number % 10 == 0 else lambda run: ""
            Run.start = start if kind in LOADING else began
            program, args = kind(rng, here)
            before = contents(here)
            outcome, text = call(program, args, known)
            changed = altered(before, contents(here), outcome)
            print(f"{number} {kind.__name__} {outcome}: {program} {args}\n{text}\n", file=record)
            record.flush()
            outcomes[kind.__name__, outcome] += 1
            if outcome == "broke" or changed:
                wrong.append(f"mistake {number}, {program} {' '.join(args)}: {changed}\n{text}")
            else:
                shutil.rmtree(here)
    FLAGS(sys.argv[:1])  # the end of this program reads flags
    print("\n".join(f"{kind}, {outcome}: {n}" for (kind, outcome), n in sorted(outcomes.items())))
    return wrong

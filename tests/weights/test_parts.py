"""The parts of a model are found in folders and on the hub; only what is wanted is fetched."""

import importlib
import shutil
import sys

import checkpoints
import pytest
import toys

from dmd_jax import weights
from dmd_jax.weights import parts

pytestmark = pytest.mark.wan  # its packages bring the hub's client


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder of "org/wan" in a cache as the hub's client has it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, revision = tmp_path / "models--org--wan", 40 * "a"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    return model / "snapshots" / revision


@pytest.fixture
def cache(snapshot, monkeypatch):
    """The same where there is no network."""
    unreachable(monkeypatch, importlib.import_module("huggingface_hub.errors").OfflineModeIsEnabled)
    return snapshot


@pytest.fixture
def offline(snapshot, monkeypatch):
    """The same where HF_HUB_OFFLINE=1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def unreachable(monkeypatch, error):
    def repo_info(*args, **kwargs):
        raise error("the network is down")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)


@pytest.mark.parametrize("name", ["org/wan", "org/wan/transformer"])
def test_a_model_is_found_in_the_cache_of_the_hub(cache, name):
    folder = checkpoints.write_folder(cache / "transformer", shards=2)
    wanted = weights.load(folder)
    blobs = cache.parents[1] / "blobs"
    blobs.mkdir()
    for i, file in enumerate(folder.iterdir()):
        file.rename(blobs / f"{i}")
        file.symlink_to(blobs / f"{i}")
    toys.assert_same(weights.load(name, part="transformer"), wanted)


def test_a_model_of_which_the_cache_lacks_a_shard_is_not_loaded(cache):
    folder = checkpoints.write_folder(cache / "transformer", shards=2)
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 2 shards.*finish the download"):
        weights.load("org/wan")


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_hub_that_is_not_reached_is_said_and_what_to_do(cache, monkeypatch, error):
    if error:  # one that the client lets through: a proxy's, say
        unreachable(monkeypatch, error)
    with pytest.raises(
        FileNotFoundError, match=r"could not be downloaded \(\w+: .*\): check"
    ) as raised:
        weights.load("org/other")
    message = str(raised.value)
    assert message.startswith(
        "'org/other' is no file or folder, is not in the cache of the Hugging"
    )
    assert message.endswith("a download made elsewhere, hf download org/other --local-dir=...")
    assert "\n" not in message


def test_offline_a_cached_model_has_the_fingerprint_of_its_folder(offline):
    folder = checkpoints.write_folder(offline / "transformer", shards=2)
    for name in ("org/wan", "org/wan/transformer"):
        assert weights.fingerprint(name) == weights.fingerprint(folder)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "org/other",
            r"'org/other' is no .* not be downloaded \(HF_HUB_OFFLINE is set\): check the",
        ),
        ("org/wan/other", r"'org/wan' has no 'other' \(without network, this is what the cache"),
        (
            "org/wan",
            r"lacks 1 of 2 shards: .*; finish the download \(without network, this is what",
        ),
    ],
)
def test_offline_what_is_not_in_the_cache_is_told_in_a_sentence(offline, name, message):
    folder = checkpoints.write_folder(offline / "transformer", shards=2)
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match=message) as raised:
        weights.fingerprint(name)
    assert len(str(raised.value).splitlines()) == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a model on a hub that is reached; what is asked for goes to a cache."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub, cache = tmp_path / "hub", tmp_path / "cache"

    def snapshot_download(name, *, allow_patterns, local_files_only=False):
        cache.mkdir(exist_ok=True)
        for file in () if local_files_only else hub.rglob("*"):
            path = str(file.relative_to(hub))
            if file.is_file() and list(filter_repo_objects([path], allow_patterns=allow_patterns)):
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / path)
        return str(cache)

    filter_repo_objects = huggingface_hub.utils.filter_repo_objects
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub, cache


def fetched(cache):
    return {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()}


DIFFUSERS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.mark.parametrize("part", parts.SUBFOLDERS)
def test_of_a_pipeline_only_the_wanted_part_is_fetched(hub, part):
    hub, cache = hub
    for folder in DIFFUSERS:
        checkpoints.write_folder(hub / folder)
    (hub / "model_index.json").write_text("{}")
    assert parts.locate("org/wan", part) == cache / part
    assert fetched(cache) == {f"{part}/{file.name}" for file in (hub / part).iterdir()}


@pytest.mark.parametrize(
    "part, file",
    [
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("vae", "Wan2.1_VAE.pth"),
        ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    ],
)
def test_of_wans_repository_only_the_wanted_file_is_fetched(hub, part, file):
    hub, cache = hub
    checkpoints.write_folder(hub, "original")
    for other in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "README.md"):
        (hub / other).touch()
    (checkpoints.write_folder(hub / "google" / "umt5-xxl") / "tokenizer.pt").touch()
    parts.locate("org/wan", part)
    assert fetched(cache) == {"config.json", file}


def test_what_a_model_holds_beside_its_weights_is_fetched_alone(hub):
    hub, cache = hub
    for folder in DIFFUSERS:
        checkpoints.write_folder(hub / folder)
    parts.locate("org/wan", "vae")  # the cache holds another part
    before = fetched(cache)
    assert parts.companion("org/wan", ("tokenizer", "google/umt5-xxl")) == cache
    assert {file.split("/")[0] for file in fetched(cache) - before} == {"tokenizer"}
    with pytest.raises(FileNotFoundError, match="org/wan has none of image_encoder"):
        parts.companion("org/wan", ("image_encoder",))


def test_what_was_fetched_once_is_not_asked_for_again(hub):
    hub, cache = hub
    checkpoints.write_folder(hub / "transformer", shards=2)
    parts.locate("org/wan")
    shutil.rmtree(hub)
    assert parts.locate("org/wan/transformer") == cache / "transformer"


def test_without_a_hub_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'dmd_jax\[wan\]'"):
        weights.load("org/wan")


@pytest.mark.parametrize("path", ["runs/dmd/generator.safetensors", "/a/b", "../a/b", "~/a/b"])
def test_what_is_a_path_is_never_asked_of_the_hub(path):
    assert parts.hub_name(path) is None
    with pytest.raises(FileNotFoundError):
        weights.denoiser(path)

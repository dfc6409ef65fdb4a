"""The parts of a model and where they are: a file, a folder, or the Hugging Face hub.

Imports files; huggingface_hub only when something is downloaded.
"""

import re
from functools import partial
from pathlib import Path

from dmd_jax.devices.disk import first_line, local_path
from dmd_jax.weights import files

# The parts of a model: sub-folders of diffusers and of Wan's repository, and files of the latter.
SUBFOLDERS = {
    "transformer": ("transformer", "high_noise_model"),
    "transformer_2": ("transformer_2", "low_noise_model"),
    "vae": ("vae",),
    "text_encoder": ("text_encoder",),
}
PART_FILES = {
    "transformer": "diffusion_pytorch_model*",
    "vae": "*VAE*.pth",
    "text_encoder": "models_t5*.pth",
}


def locate(path, part=None):
    """The file or folder of one part of a model.

    Args:
        path: a file, a folder (a part, a pipeline of diffusers, a download of Wan's repository), or
            the name of a model on the Hugging Face hub: "organisation/name", or with a sub-folder.
        part: "transformer", "transformer_2" (the low-noise expert of Wan 2.2), "vae" or
            "text_encoder"; None is the transformer of a model, or `path` itself.

    Raises:
        FileNotFoundError: the path does not exist, the model has no such part, or the download
            failed.
    """
    if part is not None and part not in SUBFOLDERS:
        raise ValueError(f"part={part!r}: use one of {sorted(SUBFOLDERS)}")
    local = local_path(path)
    if local.exists():
        return _part_of(local, part)
    if name := hub_name(path):
        return _from_hub(*name, part)
    raise FileNotFoundError(f"there is no file or folder at {str(path)!r}")


def require_part(path, found, wanted):
    """Raises ValueError if a file holds part `found` of a model and not part `wanted`."""
    if wanted not in (None, found):
        raise ValueError(
            f"{path} looks like a {found}, and a {wanted} is wanted: name a file or folder with one"
        )


def hub_name(path):
    """(name, sub-folder or None) if `path` has the form of a model on the hub; None if not."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", str(path))
    is_file = Path(path).suffix in (".safetensors", *files.TORCH)
    return None if found is None or is_file else found.groups()


def _part_of(root, part):
    if root.is_file():
        return root
    wanted = part or "transformer"
    for name in SUBFOLDERS[wanted]:
        if (root / name).is_dir():
            return root / name
    if wanted in ("vae", "text_encoder") and (found := sorted(root.glob(PART_FILES[wanted]))):
        return found[0]
    parts = {name for names in SUBFOLDERS.values() for name in names if (root / name).is_dir()}
    if parts or (wanted == "transformer_2"):
        raise FileNotFoundError(f"{root} has no {wanted}; its parts are {sorted(parts)}")
    return root


def companion(path, folders):
    """The root folder of a model, for its files that are not weights, such as a tokenizer.

    Args:
        path: a file or folder, or the name of a model on the Hugging Face hub.
        folders: sub-folders to download from the hub, one of which must exist.

    Raises:
        FileNotFoundError: the path does not exist, or the download failed.
    """
    local = local_path(path)
    if local.exists():
        return local
    if not (name := hub_name(path)):
        raise FileNotFoundError(f"there is no file or folder at {str(path)!r}")

    def checked(root):
        if not any((root / folder).is_dir() for folder in folders):
            raise FileNotFoundError(f"{path} has none of {', '.join(folders)}")
        return root

    return _download(name[0], [f"{folder}/*" for folder in folders], checked)


def _from_hub(name, subfolder, part):
    wanted = part or "transformer"
    patterns = [f"{subfolder}/*"] if subfolder else ["config.json", PART_FILES.get(wanted, "-")]
    patterns += [f"{folder}/*" for folder in SUBFOLDERS[wanted]]

    def checked(root):
        if subfolder and not (root / subfolder).exists():
            raise FileNotFoundError(f"{name!r} has no {subfolder!r}")
        found = _part_of(root / (subfolder or ""), part)
        if not found.is_file():
            files.in_folder(found)  # all of them, or it raises
        return found

    return _download(name, patterns, checked)


def _download(name, patterns, checked):
    """`checked(folder)` of a model: of the cache if it is complete there, else downloaded."""
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise ImportError(
            f"there is no file or folder at {name!r}, and the Hugging Face hub needs "
            "huggingface_hub: pip install 'dmd_jax[wan]'"
        ) from None
    download = partial(snapshot_download, name, allow_patterns=patterns)
    try:
        return checked(Path(download(local_files_only=True)))
    except FileNotFoundError:
        pass  # not in the cache, or incomplete
    try:
        root = Path(download())
    except Exception as error:  # the hub's errors have no common class
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
        raise FileNotFoundError(
            f"{name!r} is no file or folder, is not in the cache of the Hugging Face hub, and "
            f"could not be downloaded ({why}): check the name and the network, or give the folder "
            f"of a download made elsewhere, hf download {name} --local-dir=..."
        ) from error
    try:
        return checked(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} (without network, this is what the cache of the Hugging Face hub has of "
            f"{name!r})"
        ) from None

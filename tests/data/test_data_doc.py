import re
import sys
from pathlib import Path

import jax
from PIL import Image

from dmd_jax.training.run import build

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "data.md"


def test_the_builder_in_the_docs_works_as_it_stands(tmp_path, monkeypatch):
    """Writes the example to a file and a folder of pictures beside it, as the docs say."""
    builder, config, notebook = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "my_images.py").write_text(builder)
    for number, name in enumerate(["circle", "square"] * 3):
        (tmp_path / "my_images" / name).mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (20 + number, 30), 40 * number)
        picture.save(tmp_path / "my_images" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    for folder in (ROOT, tmp_path):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_images", raising=False)
    notebook = notebook.replace('"train")', f'"train", {str(tmp_path / "tfds")!r})')
    names = {}
    exec(notebook, names)
    assert len(names["source"]) == 5
    assert names["source"].image_shape == (32, 32, 3) and names["source"].num_classes == 2
    grey = {int(40 * n): n % 2 for n in range(1, 6)}  # the first is of the other split
    examples = [names["source"][i] for i in range(5)]
    assert {int(e["image"][0, 0, 0]): e["label"] for e in examples} == grey
    assert names["batch"]["data"].shape == (4, 32, 32, 3)

    exec(config, names)
    config = names["get_config"]()
    config.data.data_dir, config.batch_size = str(tmp_path / "tfds"), 8
    run = build(config, jax.devices()[:1])
    assert run.nets["generator"].net.config.num_classes == 2 and len(run.source) == 5

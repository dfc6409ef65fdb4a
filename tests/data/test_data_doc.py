import re
import sys
from pathlib import Path

from PIL import Image

DOC = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_builder_in_the_docs_works_as_it_stands(tmp_path, monkeypatch):
    """Writes the example to a file and a folder of pictures beside it, as the docs say."""
    builder, notebook = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "my_images.py").write_text(builder)
    for number, name in enumerate(["circle", "square"] * 3):
        (tmp_path / "my_images" / name).mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (20 + number, 30), 40 * number)
        picture.save(tmp_path / "my_images" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_images", raising=False)
    notebook = notebook.replace('"train")', f'"train", {str(tmp_path / "tfds")!r})')
    names = {}
    exec(notebook, names)
    assert len(names["source"]) == 6
    assert names["source"].image_shape == (32, 32, 3) and names["source"].num_classes == 2
    grey = {int(40 * n): n % 2 for n in range(6)}
    examples = [names["source"][i] for i in range(6)]
    assert {int(e["image"][0, 0, 0]): e["label"] for e in examples} == grey
    assert names["batch"]["data"].shape == (4, 32, 32, 3)

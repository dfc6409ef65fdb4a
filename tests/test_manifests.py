"""The manifests of launch/, read by the code of those they are for, where it is installed.

SkyPilot would disturb the packages of this library, so `.ci/run` gives this file an environment of
its own. It needs nothing of the library: `pytest --noconftest tests/test_manifests.py`.
"""

from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"


def lost(given, kept, path=""):
    """The paths of entries that a schema does not know, because reading dropped or changed them."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            found for key in given for found in lost(given[key], kept.get(key), f"{path}/{key}")
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [found for i, (a, b) in pairs for found in lost(a, b, f"{path}/{i}")]
    return [] if given == kept else [path]


def test_the_jobset_is_one():
    """By the models that Kubeflow generates from the schemas of JobSet and Kubernetes."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())

    def read():
        return models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()

    assert lost(manifest, read()) == []
    [job] = manifest["spec"]["replicatedJobs"]
    job["template"]["spec"]["backofLimit"] = 0
    assert lost(manifest, read()) == ["/spec/replicatedJobs/0/template/spec/backofLimit"]
    job["template"]["spec"]["parallelism"] = "many"
    with pytest.raises(ValueError, match="parallelism"):
        read()


def test_the_task_is_one_of_skypilot():
    """By SkyPilot's own schema, which refuses fields that it does not know."""
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    parts = [
        (task, schemas.get_task_schema()),
        (task["resources"], schemas.get_resources_schema()),
        (task["file_mounts"]["/runs"], schemas.get_storage_schema()),
    ]
    for part, schema in parts:
        jsonschema.validate(part, schema)
        with pytest.raises(jsonschema.ValidationError, match="not_a_field"):
            jsonschema.validate(part | {"not_a_field": 1}, schema)

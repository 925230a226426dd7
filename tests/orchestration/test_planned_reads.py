"""What planning a search reads: each folder is listed, and each file of weights opened, once; counted by Python's audit hook."""

import json
import subprocess
import sys

import yaml

from tests.data.conftest import noise_image

READ = """
import collections, json, os, sys
from pathlib import Path
from repa_lab.runs import RunsRoot
from repa_lab.spec import load_spec
from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.plan import make_plan
from repa_lab.orchestration.search.search import SearchWork

data, weights, spec, root, counts = *sys.argv[1:], collections.Counter()

def hook(event, args):
    if event in ("os.listdir", "os.scandir", "open") and args and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(args[0])
        if path.startswith((data, weights)):
            counts[event.removeprefix("os.") + " " + os.path.basename(path)] += 1

sys.addaudithook(hook)

def planned():
    counts.clear()
    plan = make_plan(load_spec(spec), RunsRoot(Path(root)))
    estimate(plan)
    directory = plan.root.sweep("few")
    directory.path.mkdir(parents=True, exist_ok=True)
    work = SearchWork(plan, directory)
    tasks = [work.next() for _ in range(6)]
    return dict(counts), len({task.run.run_id for task in tasks}), sorted({task.run.config.data.holdout for task in tasks})

first = planned()
Path(data, "more.png").write_bytes(Path(data, "0.png").read_bytes())  # between two sweeps of a process
print(json.dumps([first, planned()]))
"""


def test_a_search_reads_data_and_weights_once_a_sweep(tmp_path):
    data, weights = tmp_path / "images", tmp_path / "weights"
    data.mkdir(), weights.mkdir()
    for number in range(40):
        noise_image(number).save(data / f"{number}.png")
    (data / "0.txt").write_text("a cat")
    for name in ("encoder.pth", "reference.npz"):
        (weights / name).write_bytes(name.encode())
    (weights / "vae").mkdir()
    (weights / "vae" / "config.json").write_text(json.dumps({"in_channels": 3}))
    (weights / "vae" / "model.safetensors").write_bytes(b"tensors")
    encoder = {"name": "dinov2_vits14", "weights": str(weights / "encoder.pth")}
    spec = {
        "name": "few",
        "model": {"family": "sit", "size": "nano/2"},
        "regularizer": {"type": "repa", "encoder": encoder},
        "data": {"source": "imagefolder", "path": str(data), "vae": str(weights / "vae"), "resolution": 256},
        "train": {"steps": 10},
        "evaluate": {"extractor": {"name": "efficientnet_lite0", "reference": str(weights / "reference.npz")}},
        "seeds": 2,
        "axes": {"train.lr": [1e-4, 1e-3]},
        "search": {"space": {"regularizer.weight": {"log": [0.1, 1.0]}}, "trials": 3},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    places = [str(data), str(weights), str(tmp_path / "spec.yaml"), str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, "-c", READ, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (first, runs, held_out), (second, _, later) = json.loads(done.stdout)
    assert (runs, held_out, later) == (6, [4], [4])
    assert first["scandir images"] == second["scandir images"] == 1
    for name in ("encoder.pth", "reference.npz", "0.txt"):
        assert first[f"open {name}"] == 1, first
    assert first["open model.safetensors"] == 1 and first["scandir vae"] == 1
    assert "open encoder.pth" not in second  # the same file, by its size and time
    assert not [name for name in first if name.endswith(".png")]

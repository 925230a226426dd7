from __future__ import annotations

import subprocess
import sys

from repa_lab.training.resolve import metric_name
from tests.training.conftest import make_run


def name(**settings) -> str:
    return metric_name(make_run(evaluate=settings).config)


def test_a_number_carries_its_protocol():
    assert name() == "fid:inception@10k/ode50"
    paper = {"sampler": {"type": "sde", "steps": 250}, "guidance": {"scale": 1.8, "high": 0.7}, "samples": 50_000}
    assert name(**paper) == "fid:inception@50k/sde250-cfg1.8[0,0.7]"
    assert name(extractor={"name": "efficientnet_lite0"}, samples=500) == "frechet:efficientnet_lite0@500/ode50"
    assert name(sampler={"solver": "heun", "steps": 25}) == "fid:inception@10k/heun25"


def test_importing_it_costs_no_torch():
    code = "import sys, repa_lab.training.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

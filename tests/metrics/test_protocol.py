from __future__ import annotations

import subprocess
import sys

import pytest

from repa_lab.metrics.protocol import guidance_name, quality_names, sampler_name


@pytest.mark.parametrize(
    "type, solver, steps, name",
    [
        ("ode", "euler", 50, "ode50"),
        ("ode", "heun", 25, "heun25"),
        ("sde", "euler", 250, "sde250"),
        ("sde", "heun", 9, "sde9"),
    ],
)
def test_samplers(type, solver, steps, name):
    assert sampler_name(type, solver, steps) == name


def test_guidance():
    assert guidance_name(1.0, 0.0, 0.7) == ""
    assert guidance_name(1.8, 0.0, 0.7) == "-cfg1.8[0,0.7]"
    assert guidance_name(1.65, 0.25, 1.0) == "-cfg1.65[0.25,1]"


@pytest.mark.parametrize(
    "samples, said", [(500, "500"), (1000, "1k"), (10_000, "10k"), (50_000, "50k"), (1500, "1500")]
)
def test_only_inceptions_distance_is_fid(samples, said):
    assert quality_names("frechet", "inception", samples, "ode50") == (f"fid:inception@{said}/ode50",)
    assert quality_names("frechet", "efficientnet_lite0", samples, "sde250", "-cfg2[0,1]") == (
        f"frechet:efficientnet_lite0@{said}/sde250-cfg2[0,1]",
    )


def test_what_has_a_meaning_with_other_features_has_a_name_with_them():
    assert quality_names("kid", "inception", 500, "ode50") == ("kid:inception@500/ode50",)
    assert quality_names("kid", "dinov2_vitl14", 500, "ode50") == ("kernel:dinov2_vitl14@500/ode50",)
    assert quality_names("precision_recall", "dinov2_vitl14", 500, "ode50") == (
        "precision:dinov2_vitl14@500/ode50",
        "recall:dinov2_vitl14@500/ode50",
    )
    assert quality_names("inception_score", "dinov2_vitl14", 500, "ode50") == ()
    assert quality_names("inception_score", "inception", 500, "ode50", "-random") == ("is:inception@500/ode50-random",)


def test_importing_it_costs_no_torch():
    code = "import sys, repa_lab.metrics.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

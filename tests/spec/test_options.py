"""What options that are `auto` become on a machine."""

from __future__ import annotations

from typing import Any

import pytest

from repa_lab.spec import Machine, RunOptions

NAMES = ("precision", "micro_batch", "compile", "encoder_precision", "encoder_compile", "data_workers")
CPU = {
    "precision": "fp32",
    "micro_batch": "auto",
    "compile": False,
    "encoder_precision": "fp32",
    "encoder_compile": False,
    "data_workers": 0,
}
H100 = {
    "precision": "bf16",
    "micro_batch": "auto",
    "compile": True,
    "encoder_precision": "bf16",
    "encoder_compile": True,
    "data_workers": 8,
}


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (Machine(), CPU),
        (Machine(cores=64), CPU),
        (Machine("bf16", cores=64), H100),
        (Machine("bf16", cores=4), {**H100, "data_workers": 3}),
        (Machine("bf16"), {**H100, "data_workers": 0}),
        (Machine("bf16", cores=64, processes=8), {**H100, "micro_batch": None}),
        (Machine("bf16", compiles=False, cores=64), {**H100, "compile": False, "encoder_compile": False}),
        (Machine("fp16", cores=64), {**H100, "precision": "fp16", "encoder_precision": "fp32"}),
    ],
)
def test_auto_by_machine(machine, expected):
    assert RunOptions().automatic == tuple(sorted(NAMES, key=list(RunOptions.model_fields).index))
    resolved = RunOptions().resolved(machine)
    assert {name: getattr(resolved, name) for name in NAMES} == expected
    assert resolved.resolved(Machine()) == resolved or resolved.micro_batch == "auto"


@pytest.mark.parametrize(
    "given",
    [
        {"precision": "fp32", "compile": False, "encoder_compile": False, "data_workers": 0, "micro_batch": 4},
        {"precision": "bf16", "encoder_precision": "fp32", "compile": True, "data_workers": 2, "micro_batch": None},
    ],
)
def test_what_is_given_stays_on_any_machine(given: dict[str, Any]):
    for machine in (Machine(), Machine("bf16", cores=16), Machine("fp16", processes=2)):
        resolved = RunOptions.model_validate({**given, "log_every": 3}).resolved(machine)
        assert {name: getattr(resolved, name) for name in given} == given
        assert resolved.log_every == 3

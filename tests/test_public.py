"""The names that users import, in every order."""

import subprocess
import sys

import pytest

NAMES = """
from repa_lab import load_spec, plan, sweep, load_results
from repa_lab.align import alignment_loss, manifold_loss, resample_tokens, Schedule, REPA, UREPA, Projector
from repa_lab.models.sit import SiT
from repa_lab.metrics import frechet_distance, cka
"""


@pytest.mark.parametrize("before", ["", "import repa_lab.orchestration.plan", "import repa_lab; repa_lab.sweep"])
def test_public_names_are_there_and_callable_whatever_was_imported_before(before):
    code = before + NAMES + "assert all(map(callable, (load_spec, plan, sweep, load_results, REPA, SiT))), sweep"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_room_called_is_the_function(tmp_path):
    import repa_lab.orchestration.api
    from repa_lab import sweep

    with pytest.raises(repa_lab.spec.SpecError, match="cannot read the file"):
        sweep(tmp_path / "none.yaml")

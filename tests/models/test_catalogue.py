from __future__ import annotations

from repa_lab.models.families import FAMILIES, catalogue

ROWS = {entry.family: entry for entry in catalogue()}


def test_every_family_is_in_it():
    assert {name.split()[0] for name in ROWS} == set(FAMILIES)


def test_the_papers_parameter_counts():
    """REPA's released SiT, frozen position table included (papers.md 1.1)."""
    counts = {size: ROWS[f"sit {size}/2"].parameters for size in ("B", "L", "XL")}
    assert counts == {"B": 130_500_112, "L": 458_086_416, "XL": 675_111_184}


def test_grids_and_suggestions_of_the_guide():
    assert {name: ROWS[name].grid for name in ("sdxl", "flux", "sd3")} == {
        "sdxl": (32, 32),
        "flux": (64, 64),
        "sd3": (64, 64),
    }
    assert (ROWS["sdxl"].block_index, ROWS["sdxl"].regularizer) == ("mid", "urepa")
    assert (ROWS["flux"].block_index, ROWS["flux"].blocks, ROWS["flux"].regularizer) == (8, 57, "repa")
    assert ROWS["sit XL/2"].grid == (16, 16)

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from repa_lab.align import (
    Tokens,
    alignment_loss,
    flatten_map,
    normalise_over_space,
    resample_tokens,
)
from tests.align import references
from tests.rounding import UNIT, rounding

GRIDS = [
    ((1, 2), (1, 4)),
    ((4, 4), (8, 8)),
    ((6, 10), (5, 7)),
    ((3, 5), (9, 3)),
    ((16, 16), (37, 37)),
    ((1, 1), (2, 3)),
]
grids = pytest.mark.parametrize("grid, to", GRIDS)


def ramp(grid: tuple[int, int]) -> torch.Tensor:
    """The centre of every token, in parts of the image: ``(1, h*w, 2)`` of (row, column)."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(1, -1, 2)


class TestResample:
    def test_one_row_by_hand(self):
        tokens = torch.tensor([[[0.0, 8.0], [4.0, 0.0]]])
        expected = torch.tensor([[[0.0, 8.0], [1.0, 6.0], [3.0, 2.0], [4.0, 0.0]]])
        assert torch.equal(resample_tokens(tokens, (1, 2), (1, 4)), expected)

    @grids
    def test_it_is_bilinear_between_pixel_centres(self, grid, to):
        tokens = torch.randn(2, grid[0] * grid[1], 3)
        expected = references.bilinear(tokens.double().numpy(), grid, to)
        found = resample_tokens(tokens, grid, to).numpy()
        moved = max(grid) * UNIT * abs(expected).max()  # a position is off by a unit of itself
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(expected, (2, 2)) + moved)

    @grids
    def test_it_is_torchs_to_the_bit(self, grid, to):
        maps = torch.randn(2, 3, *grid)
        expected = functional.interpolate(maps, size=to, mode="bilinear", align_corners=False)
        assert torch.equal(resample_tokens(flatten_map(maps).values, grid, to), flatten_map(expected).values)

    def test_equal_grids_pass_through(self):
        tokens = torch.randn(2, 12, 3)
        assert resample_tokens(tokens, (3, 4), (3, 4)) is tokens

    def test_equal_counts_on_other_grids_do_not(self):
        tokens = torch.randn(1, 16, 3)
        resampled = resample_tokens(tokens, (2, 8), (4, 4))
        assert not torch.allclose(resampled, tokens)
        expected = references.bilinear(tokens.double().numpy(), (2, 8), (4, 4))
        np.testing.assert_allclose(resampled.numpy(), expected, rtol=0, atol=rounding(expected, (2, 2)))

    def test_a_ramp_stays_a_ramp_on_grids_of_another_aspect(self):
        error = (resample_tokens(ramp((48, 32)), (48, 32), (37, 37)) - ramp((37, 37))).abs().mean(dim=(0, 1))
        assert error.max() < 0.01

    @pytest.mark.parametrize("grid", [(16, 16), (24, 32), (17, 17), (64, 64), (96, 96), (128, 128), (200, 40)])
    @pytest.mark.parametrize("to", [(37, 37), (16, 16), (8, 12)])
    def test_every_student_token_gets_gradient(self, grid, to):
        student = torch.randn(1, grid[0] * grid[1], 8, requires_grad=True)
        alignment_loss(resample_tokens(student, grid, to), torch.randn(1, to[0] * to[1], 8)).backward()
        assert (student.grad.abs().amax(dim=-1) > 0).all()

    @pytest.mark.parametrize("grid, to", [((64, 64), (16, 16)), ((40, 24), (7, 5)), ((30, 8), (10, 6))])
    def test_shrinking_more_than_twofold_takes_the_area_in(self, grid, to):
        tokens = torch.randn(2, grid[0] * grid[1], 3)
        expected = references.antialiased(tokens.double().numpy(), grid, to)
        found = resample_tokens(tokens, grid, to).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(expected, (4, 16)))

    def test_halving_is_the_mean_of_four(self):
        tokens = torch.randn(1, 64, 3)
        expected = tokens.view(4, 2, 4, 2, 3).mean(dim=(1, 3)).view(1, 16, 3)
        torch.testing.assert_close(resample_tokens(tokens, (8, 8), (4, 4)), expected)

    @pytest.mark.parametrize("grid", [(96, 64), (24, 32), (100, 90)])
    def test_shrunk_ramps_stay_ramps(self, grid):
        error = (resample_tokens(ramp(grid), grid, (16, 16)) - ramp((16, 16))).abs().mean(dim=(0, 1))
        assert error.max() < 0.01

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_interpolated_in_float32(self, dtype):
        tokens = torch.randn(1, 12, 3).to(dtype)
        resampled = resample_tokens(tokens, (3, 4), (5, 7))
        assert resampled.dtype == dtype
        assert torch.equal(resampled, resample_tokens(tokens.float(), (3, 4), (5, 7)).to(dtype))

    def test_tokens_that_do_not_fill_the_grid_are_refused(self):
        with pytest.raises(ValueError, match="12 tokens do not fill the grid 4x4"):
            resample_tokens(torch.zeros(1, 12, 3), (4, 4), (2, 2))
        with pytest.raises(ValueError, match="cannot resample to the grid 0x2"):
            resample_tokens(torch.zeros(1, 12, 3), (3, 4), (0, 2))


class TestTokens:
    def test_the_mean_is_one_token_in_float32(self):
        values = torch.randn(2, 12, 3).half()
        mean = Tokens(values, (3, 4)).mean()
        assert (mean.grid, mean.values.dtype) == ((1, 1), torch.float32)
        expected = values.double().numpy().mean(axis=1)
        np.testing.assert_allclose(mean.values[:, 0], expected, rtol=0, atol=rounding(values, (1, 12)))

    def test_a_map_and_back(self):
        maps = torch.randn(2, 3, 4, 5)
        assert torch.equal(flatten_map(maps).to_map(), maps)

    def test_a_map_is_read_row_by_row(self):
        height, width = 3, 5
        maps = torch.arange(height * width).reshape(1, 1, height, width).float()
        tokens = flatten_map(maps)
        assert tokens.grid == (height, width)
        for k in range(height * width):
            assert tokens.values[0, k, 0] == maps[0, 0, k // width, k % width]

    @pytest.mark.parametrize("shape", [(3, 4, 4), (4, 4), (1, 3, 2, 4, 4)])
    def test_only_a_map_can_be_flattened(self, shape):
        with pytest.raises(ValueError, match=r"a feature map must be \(B, C, H, W\)"):
            flatten_map(torch.zeros(shape))

    def test_tokens_must_fill_their_grid(self):
        with pytest.raises(ValueError, match="16 tokens do not fill the grid 4x5"):
            Tokens(torch.zeros(2, 16, 3), (4, 5))
        with pytest.raises(ValueError, match=r"tokens must be \(B, N, D\), got shape \(16, 3\)"):
            Tokens(torch.zeros(16, 3), (4, 4))

    def test_resampling_keeps_grid_and_width_together(self):
        tokens = Tokens(torch.randn(2, 12, 3), (3, 4)).resample((6, 2))
        assert (tokens.grid, tokens.dim, tokens.values.shape) == ((6, 2), 3, (2, 12, 3))


class TestNormaliseOverSpace:
    @pytest.mark.parametrize(
        ("strength", "expected"),
        [
            (1.0, [-1.161895, -0.387298, 0.387298, 1.161895]),
            (0.6, [-0.697137, 0.077460, 0.852056, 1.626652]),
        ],
    )
    def test_the_worked_example_of_irepa(self, strength, expected):
        tokens = Tokens(torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 4, 1), (2, 2))
        found = normalise_over_space(tokens, strength)
        assert found.values.flatten().tolist() == pytest.approx(expected, abs=1e-5)
        assert found.grid == (2, 2)

    def test_a_z_score_of_each_image_and_channel(self):
        values = normalise_over_space(Tokens(torch.randn(3, 20, 5) * 7 + 4, (4, 5)), 1.0).values.double().numpy()
        np.testing.assert_allclose(values.mean(axis=1), 0, rtol=0, atol=rounding(values, (2, 20)))
        np.testing.assert_allclose(values.std(axis=1, ddof=1), 1, atol=1e-5)

    def test_it_is_computed_in_float32(self):
        tokens = Tokens((torch.randn(1, 16, 4) * 1e-4).half(), (4, 4))
        found = normalise_over_space(tokens, 1.0).values
        assert found.dtype == torch.float32
        assert torch.equal(found, normalise_over_space(Tokens(tokens.values.float(), (4, 4)), 1.0).values)

    def test_a_constant_channel_stays_finite(self):
        assert normalise_over_space(Tokens(torch.full((1, 4, 2), 3.0), (2, 2)), 1.0).values.abs().max() == 0

    def test_one_token_is_refused(self):
        with pytest.raises(ValueError, match="there is a single token"):
            normalise_over_space(Tokens(torch.zeros(1, 1, 4), (1, 1)), 1.0)

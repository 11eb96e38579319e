"""The training losses against their formulas."""

from __future__ import annotations

import pytest
import torch

from spade_kernels.testing import random_label_map
from spade_model.losses import r1_penalty
from spade_model.networks import MultiscaleDiscriminator


def test_r1_penalty_is_half_the_squared_gradient_of_the_mean_score():
    image, negative_slope = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    # An image's score is the mean of 24 patches of one scale, and of 6 of the other.
    scores = [
        (image * negative_slope).sum(1, keepdim=True),
        (image * negative_slope)[..., ::2, ::2].sum(1, keepdim=True),
    ]
    gradient = negative_slope / 24
    gradient[:, ::2, ::2] += negative_slope[:, ::2, ::2] / 6
    expected = (gradient / 2).square().sum() / 2
    torch.testing.assert_close(r1_penalty([[image, score] for score in scores], image), expected)


@pytest.mark.parametrize("norm", ["none", "spectralinstance", "batch"])
@pytest.mark.parametrize("dense", [False, True])
def test_gradient_of_the_r1_penalty(dense, norm):
    """By all weights of a discriminator, against differences."""
    network = MultiscaleDiscriminator(4, ndf=2, norm_D=norm, num_D=1, n_layers_D=2).double().eval()
    label_map = random_label_map("blobs", (2, 8, 8), 4)
    segmap = label_map.one_hot(torch.float64) + 0.5 if dense else label_map
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    names, weights = zip(*network.named_parameters(), strict=True)

    def penalty(*weights: torch.Tensor) -> torch.Tensor:
        judged = image.clone().requires_grad_()
        results = torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (segmap, judged))
        return 1e3 * r1_penalty(results, judged)

    assert torch.autograd.gradcheck(penalty, weights, fast_mode=True)

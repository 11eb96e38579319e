"""One mask judges several batches of images."""

from __future__ import annotations

import pytest
import torch

from spade_kernels.testing import random_label_map
from spade_model.networks import MultiscaleDiscriminator


@pytest.mark.parametrize("dense", [False, True])
def test_batches_are_judged_as_each_alone(dense):
    # Instance norm: batch norm would mix the batches.
    network = MultiscaleDiscriminator(4, ndf=2, norm_D="spectralinstance").double().eval()
    segmap = random_label_map("blobs", (2, 16, 18), 3, edges=True)
    segmap = segmap.one_hot(torch.float64) * 0.5 if dense else segmap
    batches = torch.randn(3, 2, 3, 16, 18, dtype=torch.float64)
    alone = [network(segmap, batch) for batch in batches]
    together = network(segmap, batches.flatten(0, 1))
    for scale, found in enumerate(together):
        for layer, feature in enumerate(found):
            torch.testing.assert_close(feature, torch.cat([results[scale][layer] for results in alone]))


def test_images_that_leave_some_without_a_mask():
    network = MultiscaleDiscriminator(3, ndf=2)
    with pytest.raises(ValueError, match="image holds 3 images, not a multiple of the 2 masks"):
        network(random_label_map("blobs", (2, 16, 16), 3), torch.randn(3, 3, 16, 16))

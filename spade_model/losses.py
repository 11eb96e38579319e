"""The training losses as pure functions of network outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_model.networks.discriminator import Features

_VGG_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


def gan_loss(results: Sequence[Features], gan_mode: str, *, is_real: bool, for_discriminator: bool) -> Tensor:
    """Adversarial loss of the scores, averaged over the discriminator's scales.

    Args:
        results: `MultiscaleDiscriminator`'s output; the last feature of each scale is its score.
        gan_mode: "hinge", "ls" (least squares), "original" (cross entropy) or "w" (Wasserstein).
        is_real: True for photographs, and for generated images in the generator's loss.
        for_discriminator: True for the discriminator's loss; gan_mode "hinge" clips only that one.
    """
    scores = [features[-1].float() for features in results]
    return torch.stack([_score_loss(s, gan_mode, is_real, for_discriminator) for s in scores]).mean()


def _score_loss(score: Tensor, gan_mode: str, is_real: bool, for_discriminator: bool) -> Tensor:
    sign = 1.0 if is_real else -1.0
    if gan_mode == "hinge":
        return (1 - sign * score).relu().mean() if for_discriminator else -score.mean()
    if gan_mode == "w":
        return -sign * score.mean()
    target = torch.full_like(score, float(is_real))
    if gan_mode == "ls":
        return F.mse_loss(score, target)
    if gan_mode == "original":
        return F.binary_cross_entropy_with_logits(score, target)
    raise ValueError(f"gan_mode {gan_mode!r} is not one of hinge, ls, original, w")


def r1_penalty(results: Sequence[Features], image: Tensor) -> Tensor:
    """Half the squared norm of each image's score gradient, averaged over images (R1, Mescheder et al. 2018).

    An image's score is the mean over its patches and the discriminator's scales, as `gan_loss` averages them.

    Args:
        results: `MultiscaleDiscriminator`'s output for `image`, which requires gradients.
    """
    scores = torch.stack([features[-1].mean((1, 2, 3)) for features in results]).mean(0)
    (gradient,) = torch.autograd.grad(scores.sum(), image, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def feature_matching_loss(fake: Sequence[Features], real: Sequence[Features]) -> Tensor:
    """L1 distance between the discriminator's inner features of fake and real images (pix2pixHD eq. 4)."""
    distances = [
        F.l1_loss(a.float(), b.float().detach())
        for f, r in zip(fake, real, strict=True)
        for a, b in zip(f[:-1], r[:-1], strict=True)
    ]
    return torch.stack(distances).sum() / len(fake)


def vgg_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Weighted L1 distance between VGG19 features of fake and real images."""
    pairs = zip(_VGG_WEIGHTS, fake, real, strict=True)
    return torch.stack([weight * F.l1_loss(a.float(), b.float().detach()) for weight, a, b in pairs]).sum()


def kld_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mu, exp(logvar)) from N(0, 1), summed over the batch as the original does."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()

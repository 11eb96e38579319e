"""Measures how well images match their masks, with a classifier of pixel colours fitted to real images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class ClassColours:
    """Classifies pixels by colour, with one Gaussian over RGB for each class.

    mean: (classes, 3); precision: (classes, 3, 3), inverse covariance; log_det: (classes,), log determinant of
    covariance.
    A class that was not seen has log_det = inf and is never chosen.
    """

    mean: np.ndarray
    precision: np.ndarray
    log_det: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], num_labels: int) -> ClassColours:
        """Fits the Gaussians to pairs of labels (N, H, W) and images (N, 3, H, W) in [-1, 1]."""
        count, total, squares = np.zeros(num_labels), np.zeros((num_labels, 3)), np.zeros((num_labels, 3, 3))
        for labels, images in pairs:
            pixels, classes = _pixels(images), labels.flatten().numpy()
            for label in np.unique(classes):
                members = pixels[classes == label]
                count[label] += len(members)
                total[label] += members.sum(0)
                squares[label] += members.T @ members
        seen = np.maximum(count, 1)
        mean = total / seen[:, None]
        covariance = squares / seen[:, None, None] - mean[:, :, None] * mean[:, None, :] + 1e-4 * np.eye(3)
        log_det = np.where(count > 0, np.linalg.slogdet(covariance)[1], np.inf)
        return cls(mean, np.linalg.inv(covariance), log_det)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the most likely class of every pixel, int64 (N, H, W), for images (N, 3, H, W) in [-1, 1]."""
        n, _, h, w = images.shape
        offset = _pixels(images)[:, None] - self.mean
        distance = np.einsum("pki,kij,pkj->pk", offset, self.precision, offset, optimize=True)
        return torch.from_numpy((distance + self.log_det).argmin(1)).view(n, h, w)

    def agreement(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Returns the fraction of pixels whose most likely class is their label."""
        right = pixels = 0
        for labels, images in pairs:
            right += int((self.classify(images) == labels).sum())
            pixels += labels.numel()
        return right / pixels


def _pixels(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).flatten(0, 2).double().cpu().numpy()

"""VGG19 features for the perceptual loss. The weights come from the user's file or torch's download cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spade_model.errors import UserError

_WIDTHS: list[int | str] = [
    64,
    64,
    "pool",
    128,
    128,
    "pool",
    256,
    256,
    256,
    256,
    "pool",
    512,
    512,
    512,
    512,
    "pool",
    512,
]
_SLICE_ENDS = (1, 6, 11, 20, 29)
WEIGHTS_URL_NAME = "vgg19-dcbb9e9d.pth"


class VGG19Features(nn.Module):
    """Activations relu1_1, relu2_1, relu3_1, relu4_1, relu5_1 of VGG19 (Simonyan & Zisserman 2015).

    Parameter names are those of the common `vgg19` state dict (`features.<i>.weight`); its other entries are
    ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Returns five feature maps of images (N, 3, H, W) in [-1, 1].

        Like the original, this does not normalize the images by VGG's mean and standard deviation. Grey images
        (N, 1, H, W) are taken as RGB of three equal channels.
        """
        results, x = [], image.expand(-1, 3, -1, -1)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _SLICE_ENDS:
                results.append(x)
        return results


def load_vgg19(path: str = "") -> VGG19Features:
    """Loads VGG19 in eval mode, with weights that require no gradients.

    Args:
        path: a `vgg19` state dict, .pth or .safetensors; if empty, torch's download cache is searched.

    Raises:
        UserError: the file is missing or does not hold VGG19's weights; the message says where to get the weights.
    """
    from spade_model.checkpoint import read_state_dict

    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL_NAME
    if not file.is_file():
        raise UserError(
            f"no VGG19 weights at {file}. Download {WEIGHTS_URL_NAME} (torchvision's vgg19) and pass it with "
            "--vgg_weights, or train without the perceptual loss: --no_vgg_loss"
        )
    state = read_state_dict(file)
    network = VGG19Features()
    wanted = network.state_dict()
    missing = [k for k in wanted if k not in state or state[k].shape != wanted[k].shape]
    if missing:
        raise UserError(
            f"{file} does not hold VGG19's weights: {missing[0]} is missing or of another shape. "
            f"Pass {WEIGHTS_URL_NAME} (torchvision's vgg19) with --vgg_weights"
        )
    network.load_state_dict({k: state[k] for k in wanted})
    return network.eval().requires_grad_(False)

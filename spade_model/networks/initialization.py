"""Weight initialisation, selected by the original's option values."""

from __future__ import annotations

from torch import nn

from spade_model.errors import UserError


def initialize(network: nn.Module, init_type: str = "xavier", gain: float = 0.02) -> nn.Module:
    """Draws new weights for all convolutions and linear layers, in place, and returns the network.

    Biases become 0. Batch-norm scales are drawn with mean 1 and standard deviation `gain`.

    Args:
        init_type: "xavier", "xavier_uniform", "normal" (standard deviation `gain`), "kaiming", "orthogonal", or "none"
            to leave each layer its own default. `xavier_uniform` uses gain 1, as the original does.
    """
    draws = {
        "normal": lambda w: nn.init.normal_(w, 0.0, gain),
        "xavier": lambda w: nn.init.xavier_normal_(w, gain=gain),
        "xavier_uniform": lambda w: nn.init.xavier_uniform_(w, gain=1.0),
        "kaiming": lambda w: nn.init.kaiming_normal_(w, a=0, mode="fan_in"),
        "orthogonal": lambda w: nn.init.orthogonal_(w, gain=gain),
    }
    if init_type != "none" and init_type not in draws:
        raise UserError(f"init_type {init_type!r} is not one of {', '.join(draws)}, none")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, gain)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and init_type != "none":
            draws[init_type](module.weight_orig if hasattr(module, "weight_orig") else module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network

"""The report of `accelerate`: which layers were replaced, and why others were not."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Replaced:
    """One accelerated layer or block.

    Attributes:
        name: the module's name in the model; empty for the model itself. layer: name of its class.
        family: name of its family; "residual block" for a block.
        error: the largest relative difference that the probe found.
        speedup: time of the original forward divided by that of the accelerated one; None unless measured.
    """

    name: str
    layer: str
    family: str
    error: float
    speedup: float | None = None


@dataclass
class Report:
    """The result of `accelerate`. `print` shows it as a table.

    Attributes:
        replaced: the layers and blocks that are accelerated now.
        left: (name, class, reason) of each module that looks like a SPADE layer but was left alone.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return "accelerate: there is no SPADE layer in this model"
        rows = [("layer", "class", "family", "error", "speed-up")]
        rows += [
            (one.name or "(the model)", one.layer, one.family, f"{one.error:.0e}", _speedup(one.speedup))
            for one in self.replaced
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"left alone: {name or '(the model)'} ({layer}): {reason}" for name, layer, reason in self.left]
        return "\n".join(lines)


def _speedup(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.1f}x"

"""How a layer keeps its weight: as it is, or as int8 with one scale for each output row (W8A16).

R rows (outputs), I inputs. Activations keep their dtype; how int8 is multiplied is the matter of kernels/ops.py, which
is given the scale beside the weight. Weights are quantized while they are loaded, row by row and without calibration
data: symmetric, round to nearest, scale = largest magnitude / 127. A row's scale is that of the whole row, also where a
rank keeps only some of its columns, so that the model is the same at every TP degree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 127  # -128 is not used: the grid is symmetric


@dataclass(frozen=True)
class Scheme:
    """name: as the option `quantization` has it. scaled: int8 weights, each row with a scale of its own in fp32."""

    name: str
    scaled: bool = False

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """What the weights of a model that computes in `dtype` are kept as."""
        return torch.int8 if self.scaled else dtype


NONE, INT8 = Scheme("none"), Scheme("int8", scaled=True)
SCHEMES = {scheme.name: scheme for scheme in (NONE, INT8)}


def quantize(weight_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [R, I] and scales fp32 [R], such that int8 * scale is off by at most half a scale; a row of zeros has 0.

    A row with a number that is not finite gets a scale that is not finite, so that its products show it. Needs memory
    for the weight in fp32 twice.
    """
    wide_RI = weight_RI.float()
    scale_R = wide_RI.abs().amax(dim=1) / LARGEST
    steps_RI = (wide_RI / torch.where(scale_R > 0, scale_R, 1.0)[:, None]).round_()
    return steps_RI.clamp_(-LARGEST, LARGEST).to(torch.int8), scale_R

"""Masked pre-training: learning from pictures without labels by filling in what was hidden."""

from dataclasses import dataclass
from typing import Literal

from vitrail.config.checks import require_least
from vitrail.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedConfig:
    """Masked pre-training of a ViT, on pictures with or without labels.

    `pixels`: masked autoencoding, MAE (He et al., 2021, arXiv 2111.06377): the ViT sees the patches that are left, a
    small decoder paints the others. `colour`: the ViT paper's masked patch prediction (arXiv 2010.11929, appendix
    B.1.2), after BERT (Devlin et al., 2018, section 3.1): the mean colour of corrupted patches, one of 512.
    """

    objective: Literal["pixels", "colour"] = "pixels"
    """What is predicted of hidden patches: their pixels (MAE) or their mean 3-bit colour (ViT paper)."""
    mask_ratio: float = 0.75
    """Share of the patches that are hidden: 0.75 in MAE, 0.5 in the ViT paper."""
    norm_targets: bool = True
    """`pixels`: predict each patch's pixels after normalising them by the patch's own mean and deviation."""
    decoder_width: int = 512
    """`pixels`: width of the decoder, which is thrown away after pre-training."""
    decoder_depth: int = 8
    """`pixels`: blocks of the decoder."""
    decoder_heads: int = 16
    """`pixels`: attention heads of the decoder."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--recipe.mask-ratio must lie between 0 and 1, not {self.mask_ratio}.")
        require_least(self, decoder_width=1, decoder_depth=1, decoder_heads=1)
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise UserError(
                "--recipe.decoder-width must be a multiple of 4, for its sin-cos positions, and of "
                f"--recipe.decoder-heads {self.decoder_heads}, not {self.decoder_width}."
            )

"""What a ViT needs beside itself to learn from masked pictures. None of it is shipped.

A mask is two tables of patch numbers, counted row by row: `hidden`, equally many in every picture, and `kept`, the
others, or `shown`, what stands in the hidden places instead. Who draws them is no concern of the models.
"""

from typing import final

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.config.masked import MaskedConfig
from vitrail.config.vit import ViTConfig
from vitrail.layers.embedding import sincos_positions
from vitrail.models.vit import Block, ViT

MASK_TOKEN = -1
"""In `shown`: the learned [mask] embedding."""
COLOUR_BITS = 3


@final
class ColourHead(nn.Module):
    """The [mask] embedding, and a linear classifier of mean colours."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.head = nn.Linear(config.width, 2 ** (COLOUR_BITS * config.channels))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Mask token N(0, 0.02), as BERT's embeddings; the head 0, as a ViT's."""
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


@final
class PixelDecoder(nn.Module):
    """MAE's decoder: a light ViT over the encoded patches and mask tokens in the places of the others."""

    def __init__(self, config: ViTConfig, recipe: MaskedConfig) -> None:
        super().__init__()
        width = recipe.decoder_width
        light = ViTConfig(
            width=width,
            heads=recipe.decoder_heads,
            mlp_dim=4 * width,
            qkv_bias=config.qkv_bias,
            gelu=config.gelu,
            norm_eps=config.norm_eps,
        )
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(Block(light, drop_path=0.0) for _ in range(recipe.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.patch_size[0] * config.patch_size[1] * config.channels)

    def forward(
        self, tokens: Float[Tensor, "b encoded d"], kept: Int[Tensor, "b k"], grid: tuple[int, int]
    ) -> Float[Tensor, "b n values"]:
        """Return what is painted into every patch of the grid, in the places of `patch_pixels`.

        Args:
            tokens: The encoder's output: the class token, where there is one, then the patches in `kept`.
            kept: Places of these patches.
            grid: Rows and columns of patches.
        """
        x = self.embed(tokens)
        class_token, patches = x[:, : -kept.shape[1]], x[:, -kept.shape[1] :]
        places = repeat(self.mask_token.to(x.dtype), "1 1 d -> b n d", b=len(x), n=grid[0] * grid[1])
        x = places.scatter(1, repeat(kept, "b k -> b k d", d=x.shape[2]), patches)
        x = x + sincos_positions(*grid, x.shape[2]).to(x)
        x = torch.cat([class_token, x], dim=1)  # the class token's position is 0, as in the authors' table
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, class_token.shape[1] :]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Mask token N(0, 0.02), matrices Xavier uniform, biases 0 (facebookresearch/mae `models_mae.py`)."""
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in (self.embed, self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights()
        self.norm.reset_parameters()


@final
class MaskedColours(nn.Module):
    """Masked patch prediction (ViT paper, appendix B.1.2): a ViT on corrupted patches, and a head for their colours."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit, self.decoder = vit, ColourHead(vit.config)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        colours: Int[Tensor, "b n"],
        hidden: Int[Tensor, "b m"],
        shown: Int[Tensor, "b m"],
    ) -> Float[Tensor, " b"]:
        """Return each picture's mean cross-entropy over its hidden patches.

        Args:
            images: Normalised pictures.
            colours: The colour of every patch, as `patch_colours` gives it.
            hidden: Places of the corrupted patches.
            shown: What stands there: the number of the patch whose embedding it is, or `MASK_TOKEN`.
        """
        logits = self.predict(images, hidden, shown).float()
        return reduce(F.cross_entropy(logits.mT, colours.gather(1, hidden), reduction="none"), "b m -> b", "mean")

    def predict(
        self, images: Float[Tensor, "b c h w"], hidden: Int[Tensor, "b m"], shown: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b m colours"]:
        """Return the logits of the hidden patches' colours, each from its own output token."""
        patches, positions = patch_tokens(self.vit, images)
        others = take(patches, shown.clamp(min=0))
        instead = torch.where((shown == MASK_TOKEN)[:, :, None], self.decoder.mask_token.to(patches.dtype), others)
        corrupted = patches.scatter(1, repeat(hidden, "b m -> b m d", d=patches.shape[2]), instead)
        # Positions stay what they were: the model is told where, not what.
        tokens = encode(self.vit, corrupted + positions)
        return self.decoder.head(take(tokens[:, -patches.shape[1] :], hidden))


@final
class MaskedPixels(nn.Module):
    """Masked autoencoder (He et al., 2021, figure 1): a ViT on the patches that are left, and a decoder."""

    def __init__(self, vit: ViT, recipe: MaskedConfig) -> None:
        super().__init__()
        self.vit, self.decoder = vit, PixelDecoder(vit.config, recipe)
        self._norm_targets = recipe.norm_targets

    def forward(
        self, images: Float[Tensor, "b c h w"], kept: Int[Tensor, "b k"], hidden: Int[Tensor, "b m"]
    ) -> Float[Tensor, " b"]:
        """Return each picture's mean squared error over the pixels of its hidden patches.

        Args:
            images: Normalised pictures.
            kept: Places of the patches that the ViT sees.
            hidden: Places of the others.
        """
        targets = take(patch_pixels(images, self.vit.config.patch_size), hidden)
        if self._norm_targets:
            mean, deviation = patch_statistics(targets)
            targets = (targets - mean) / deviation
        painted = take(self.predict(images, kept), hidden).float()
        return reduce((painted - targets) ** 2, "b m values -> b", "mean")

    def predict(self, images: Float[Tensor, "b c h w"], kept: Int[Tensor, "b k"]) -> Float[Tensor, "b n values"]:
        """Return what the decoder paints into every patch when the ViT has seen those in `kept` alone."""
        patches, positions = patch_tokens(self.vit, images)
        tokens = encode(self.vit, take(patches + positions, kept))
        return self.decoder(tokens, kept, self.vit.config.grid_at((images.shape[2], images.shape[3])))


def patch_tokens(vit: ViT, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "1 n d"]]:
    """Return a ViT's patch embeddings, and their positions."""
    patches = vit.patch_embed(images)
    _, positions = vit.position_rows((patches.shape[2], patches.shape[3]))
    return rearrange(patches, "b d h w -> b (h w) d"), positions.to(patches.dtype)


def encode(vit: ViT, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b encoded d"]:
    """Return the ViT's output for any patches that have their positions: the class token comes first, if there is one.

    As `ViT.tokens`, which takes all patches of a picture.
    """
    if vit.class_token is not None:
        position, _ = vit.position_rows(vit.config.grid)
        token = vit.class_token if position is None else vit.class_token + position
        x = torch.cat([repeat(token.to(x.dtype), "1 1 d -> b 1 d", b=len(x)), x], dim=1)
    x = vit.dropout(x)
    for block in vit.blocks():
        x = block(x)
    return vit.norm(x)


def take(rows: Float[Tensor, "b n d"], places: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Return the rows of each picture that stand at its `places`."""
    return rows.gather(1, repeat(places, "b k -> b k d", d=rows.shape[2]))


def patch_pixels(images: Float[Tensor, "b c h w"], patch: tuple[int, int]) -> Float[Tensor, "b n values"]:
    """Return the pixels of every patch, row by row, channels last. What is left over at the edges is left out."""
    rows, columns = images.shape[2] // patch[0], images.shape[3] // patch[1]
    whole = images[:, :, : rows * patch[0], : columns * patch[1]]
    return rearrange(whole, "b c (h p) (w q) -> b (h w) (p q c)", p=patch[0], q=patch[1])


def patch_statistics(
    pixels: Float[Tensor, "b n values"],
) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Return mean and deviation of each patch's pixels, as MAE normalises them (`norm_pix_loss`)."""
    mean = pixels.mean(dim=2, keepdim=True)
    # The authors' variance is torch's unbiased one, which a patch of one value does not have.
    variance = pixels.var(dim=2, keepdim=True, correction=min(1, pixels.shape[2] - 1))
    return mean, (variance + 1e-6).sqrt()


def patch_colours(levels: Float[Tensor, "b c h w"], patch: tuple[int, int]) -> Int[Tensor, "b n"]:
    """Return each patch's mean colour with 3 bits per channel, as one number; the first channel has the highest bits.

    The mean is rounded to a level of 8 bits first: then a patch of one level never falls on an edge between colours.

    Args:
        levels: Pictures in [0, 255].
        patch: Height and width of a patch.
    """
    means = reduce(patch_pixels(levels, patch), "b n (pixels c) -> b n c", "mean", c=levels.shape[1])
    bits = means.round().clamp(0, 255).long() >> (8 - COLOUR_BITS)
    shifts = COLOUR_BITS * torch.arange(bits.shape[2] - 1, -1, -1, device=bits.device)
    return (bits << shifts).sum(dim=2)

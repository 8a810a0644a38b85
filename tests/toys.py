"""What the toy models of the tests share: pixels are their features, and they are one block deep."""

from collections.abc import Sequence

from torch import Tensor, nn

from vitrail.models.base import ImageModel


class PixelModel(ImageModel):
    """A model of which only the forward pass matters; it says the rest that every model must."""

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def feature_map(self, images: Tensor) -> Tensor:
        return images

    def blocks(self) -> Sequence[nn.Module]:
        return ()

    def depth_of(self, name: str) -> int:
        return 1

    def init_weights(self) -> None: ...

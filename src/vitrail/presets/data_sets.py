"""The papers' data sets: what the numbers of their recipes follow from. The pictures are the user's to bring."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set as a paper trains on it."""

    title: str
    """Name in print."""
    pictures: int
    """Training pictures."""
    classes: int
    """Classes."""
    held_out: float
    """Share of the training pictures that is held out to choose settings by."""

    def steps(self, epochs: float, batch_size: int) -> int:
        """Return the updates in so many passes over all training pictures."""
        return int(epochs * self.pictures / batch_size)


# Held out: 1 % of ImageNet, 2 % of CIFAR, 10 % of Pets and Flowers (ViT paper, appendix B.1.1); 51,200 pictures of
# ImageNet-21k (big_vision configs/vit_i21k.py); 50 of every class of ImageNet-21K-P. JFT was never published: its
# classes follow from the sizes of published models, its held-out part is about as large as ImageNet-21k's.
DATA_SETS: dict[str, DataSet] = {
    "cifar10": DataSet("CIFAR-10", 50_000, 10, 0.02),
    "cifar100": DataSet("CIFAR-100", 50_000, 100, 0.02),
    "pets": DataSet("Oxford-IIIT Pets", 3_680, 37, 0.1),
    "flowers": DataSet("Oxford Flowers-102", 2_040, 102, 0.1),
    "imagenet": DataSet("ImageNet", 1_281_167, 1_000, 0.01),
    "imagenet21k": DataSet("ImageNet-21k", 14_197_122, 21_843, 0.0036),
    "imagenet21kp": DataSet("ImageNet-21K-P", 11_797_632, 11_221, 0.045),
    "jft300m": DataSet("JFT-300M", 303_000_000, 18_291, 0.0002),
    "jft3b": DataSet("JFT-3B", 3_000_000_000, 29_593, 0.00002),
}

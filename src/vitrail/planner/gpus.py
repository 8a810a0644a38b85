"""GPUs: what their makers say of them, and what an hour usually costs. One row each."""

from dataclasses import dataclass

from vitrail.errors import UserError, did_you_mean

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU, in a machine as it is usually sold. Rates are peaks, without sparsity; links in one direction."""

    title: str
    memory: float
    """GiB that torch reports as its total: somewhat less than is printed on the box."""
    half: float
    """bf16 products with sums in fp32: TFLOP/s of tensor cores."""
    single: float
    """fp32 products, TFLOP/s."""
    bandwidth: float
    """Of its memory, GB/s."""
    link: float
    """Between GPUs of a machine, GB/s of each."""
    network: float
    """Between machines, GB/s of each machine."""
    per_machine: int
    price: float
    """Dollars an hour: an assumption, from what clouds asked in 2025; `--price` says what yours asks."""
    grouped_products: bool
    """Whether torch multiplies the rows of several experts at once (`layers.moe.multiple_of_rows`)."""
    source: str


GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        title="H100 SXM 80 GB", memory=79.1, half=989.0, single=67.0, bandwidth=3350.0, link=450.0, network=400.0,
        per_machine=8, price=3.0, grouped_products=True,
        source="NVIDIA H100 datasheet (SXM), DGX H100: NVLink 900 GB/s both ways, 8 x 400 Gb/s",
    ),
    "h200": Gpu(
        title="H200 SXM 141 GB", memory=139.8, half=989.0, single=67.0, bandwidth=4800.0, link=450.0, network=400.0,
        per_machine=8, price=3.5, grouped_products=True,
        source="NVIDIA H200 datasheet (SXM), DGX H200: NVLink 900 GB/s both ways, 8 x 400 Gb/s",
    ),
    "b200": Gpu(
        title="B200 SXM 180 GB", memory=178.4, half=2250.0, single=75.0, bandwidth=8000.0, link=900.0, network=400.0,
        per_machine=8, price=5.5, grouped_products=False,
        source="NVIDIA DGX B200 and HGX B200 datasheets: NVLink 1.8 TB/s both ways, 8 x 400 Gb/s",
    ),
    "a100-80": Gpu(
        title="A100 SXM 80 GB", memory=79.2, half=312.0, single=19.5, bandwidth=2039.0, link=300.0, network=200.0,
        per_machine=8, price=1.8, grouped_products=False,
        source="NVIDIA A100 datasheet (SXM 80 GB), DGX A100: NVLink 600 GB/s both ways, 8 x 200 Gb/s",
    ),
    "a100-40": Gpu(
        title="A100 SXM 40 GB", memory=39.4, half=312.0, single=19.5, bandwidth=1555.0, link=300.0, network=200.0,
        per_machine=8, price=1.4, grouped_products=False,
        source="NVIDIA A100 datasheet (SXM 40 GB), DGX A100: NVLink 600 GB/s both ways, 8 x 200 Gb/s",
    ),
    "l4": Gpu(
        title="L4 24 GB", memory=22.0, half=121.0, single=30.3, bandwidth=300.0, link=32.0, network=12.5,
        per_machine=8, price=0.8, grouped_products=False,
        source="NVIDIA L4 datasheet; PCIe 4.0 x16, 100 Gb/s between machines assumed",
    ),
    "rtx-4090": Gpu(
        title="RTX 4090 24 GB", memory=23.6, half=165.0, single=82.6, bandwidth=1008.0, link=16.0, network=12.5,
        per_machine=8, price=0.5, grouped_products=False,
        source="NVIDIA Ada whitepaper; PCIe 4.0 x16 through the host, which halves it; 100 Gb/s assumed",
    ),
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Return a GPU by name; capitals, spaces and underscores do not matter.

    Raises:
        UserError: When there is none of that name.
    """
    plain = name.lower().replace(" ", "-").replace("_", "-")
    if plain not in GPUS:
        raise UserError(
            f"there is no GPU named {name!r} in the table.{did_you_mean(plain, GPUS)} There are {', '.join(GPUS)}."
        )
    return GPUS[plain]

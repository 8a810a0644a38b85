"""The figure of each family, drawn after its paper's."""

from drawing import Drawing, Kind

Row = tuple[str, Kind, str]
"""Words of a box, its kind, and a note beside it."""


def vit() -> Drawing:
    """After figure 1 of the ViT paper: read from bottom to top; at the right, one block of the encoder."""
    d = Drawing(560, 470, "ViT: patches, class token and positions, L encoder blocks, head")
    for row in range(3):
        for column in range(3):
            d.box(20 + 27 * column, 372 + 27 * row, 24, 24, "", "input")
    d.words(60, 466, "picture", small=True)
    d.box(120, 392, 190, 40, "linear projection", "input")
    d.arrow((102, 412), (120, 412))
    for number in range(7):
        x = 34 + 40 * number
        d.box(x, 318, 26, 26, "∗" if number == 0 else "", "head" if number == 0 else "input")
        d.words(x + 13, 312, str(number), small=True)
        d.arrow((x + 13, 300), (x + 13, 276))
    d.arrow((215, 392), (215, 346))
    d.words(120, 456, "∗ class token; 0, 1, 2 …: positions", small=True, anchor="start")
    d.box(20, 216, 290, 60, "Transformer encoder, L blocks", "attention")
    d.arrow((47, 216), (47, 170))
    d.box(20, 130, 190, 40, "norm, MLP head", "head")
    d.arrow((115, 130), (115, 96))
    d.words(115, 84, "class")
    d.words(60, 196, "class token", small=True, anchor="start")
    encoder_block(d, 380, 40, "MLP")
    return d


def encoder_block(d: Drawing, x: float, y: float, last: str) -> None:
    """Draw a pre-norm block, 160 wide and 390 high: attention below, `last` above."""
    middle = x + 80
    d.words(middle, y - 14, "one block")
    d.box(x - 14, y, 188, 360, "", "plain")
    d.arrow((middle, y + 385), (middle, y + 322))
    d.box(x, y + 290, 160, 32, "norm", "plain")
    d.arrow((middle, y + 290), (middle, y + 260))
    d.box(x, y + 216, 160, 44, "multi-head\nself-attention", "attention")
    d.arrow((middle, y + 216), (middle, y + 194))
    d.arrow((middle, y + 342), (x - 6, y + 342), (x - 6, y + 185), (middle - 9, y + 185))
    d.sum(middle, y + 185)
    d.arrow((middle, y + 176), (middle, y + 148))
    d.box(x, y + 116, 160, 32, "norm", "plain")
    d.arrow((middle, y + 116), (middle, y + 92))
    d.box(x, y + 52, 160, 40, last, "mlp")
    d.arrow((middle, y + 52), (middle, y + 33))
    d.arrow((middle, y + 163), (x - 6, y + 163), (x - 6, y + 24), (middle - 9, y + 24))
    d.sum(middle, y + 24)
    d.arrow((middle, y + 15), (middle, y - 8))


def v_moe() -> Drawing:
    """After figure 2 of the V-MoE paper: what stands in some blocks in place of the MLP."""
    d = Drawing(560, 370, "V-MoE: a router sends each token to its k best experts; their answers are summed by weight")
    d.words(16, 352, "tokens of the pictures, after the norm", small=True, anchor="start")
    for number in range(8):
        d.box(16 + 34 * number, 306, 26, 26, "", "input")
    d.arrow((148, 306), (148, 276))
    d.box(16, 236, 264, 40, "router: softmax(W x), best k", "head")
    for number, name in enumerate(("MLP 1", "MLP 2", "…", "MLP E")):
        x = 16 + 68 * number
        d.arrow((x + 30, 236), (x + 30, 186))
        if name == "…":
            d.words(x + 30, 166, name)
        else:
            d.box(x, 140, 60, 46, name, "mlp")
        d.arrow((x + 30, 140), (x + 30, 92))
    d.box(16, 52, 264, 40, "sum, weighted by the router", "head")
    d.arrow((148, 52), (148, 22))
    d.words(296, 260, "noise while it learns;", small=True, anchor="start")
    d.words(296, 276, "losses keep experts evenly busy", small=True, anchor="start")
    d.words(296, 160, "each has room for C tokens;", small=True, anchor="start")
    d.words(296, 176, "for what finds none, the block is", small=True, anchor="start")
    d.words(296, 192, "the identity. In evaluation here,", small=True, anchor="start")
    d.words(296, 208, "all find room", small=True, anchor="start")
    d.words(160, 30, "on to the residual sum of the block", small=True, anchor="start")
    return d


def cvt() -> Drawing:
    """After figure 2 of the CvT paper: three stages, and the projection of a block."""
    d = Drawing(
        560, 420, "CvT: three stages of convolutional token embedding and blocks with convolutional projections"
    )
    d.words(16, 30, "picture", anchor="start")
    d.arrow((66, 25), (92, 25))
    for number, (kernel, blocks) in enumerate(
        (("7×7, stride 4", "N₁"), ("3×3, stride 2", "N₂"), ("3×3, stride 2", "N₃"))
    ):
        y = 10 + 66 * number
        d.box(92, y, 190, 42, f"convolutional token\nembedding, {kernel}", "input")
        d.arrow((282, y + 21), (304, y + 21))
        d.box(304, y, 150, 42, f"blocks × {blocks}", "attention")
        d.words(464, y + 26, f"stage {number + 1}", small=True, anchor="start")
        if number < 2:
            d.arrow((379, y + 42), (379, y + 54), (187, y + 54), (187, y + 66))
    d.words(304, 204, "the class token joins in stage 3, and the head reads it", small=True)
    d.box(14, 226, 532, 184, "", "plain")
    d.words(24, 246, "attention of a block", anchor="start")
    for number, (name, stride) in enumerate((("query", 1), ("key", 2), ("value", 2))):
        y = 258 + 50 * number
        d.box(84, y, 190, 38, f"depthwise 3×3, stride {stride},\nBatchNorm", "mlp")
        d.arrow((56, y + 19), (84, y + 19))
        d.arrow((274, y + 19), (296, y + 19))
        d.box(296, y, 66, 38, "linear", "plain")
        d.arrow((362, y + 19), (404, y + 19))
        d.words(382, y + 12, name, small=True)
    d.arrow((56, 277), (56, 377), tip=False)
    d.arrow((30, 327), (56, 327), tip=False)
    d.words(22, 314, "map", small=True, anchor="start")
    d.box(404, 258, 130, 138, "multi-head\nattention, a\nquarter of the\nkeys and values", "attention")
    return d


def coatnet() -> Drawing:
    """After table 3 and figure 4 of the CoAtNet paper: five stages, each at half the resolution of the one before."""
    d = Drawing(560, 440, "CoAtNet: stem, two stages of MBConv, two of relative attention")
    rows: list[Row] = [
        ("S0: two 3×3 convolutions", "input", "1/2 of the picture's side"),
        ("S1: MBConv × L₁", "mlp", "1/4"),
        ("S2: MBConv × L₂", "mlp", "1/8"),
        ("S3: attention + MLP × L₃", "attention", "1/16; CoAtNet-6 and 7: MBConv first"),
        ("S4: attention + MLP × L₄", "attention", "1/32"),
        ("mean, norm, tanh layer, head", "head", ""),
    ]
    for number, (text, kind, note) in enumerate(rows):
        y, width = 10 + 52 * number, 270
        d.box(16, y, width, 34, text, kind)
        d.words(16 + width + 10, y + 21, note, small=True, anchor="start")
        if number:
            d.arrow((150, y - 18), (150, y))
    d.box(14, 330, 532, 100, "", "plain")
    d.words(24, 350, "relative attention", anchor="start")
    d.words(280, 388, "softmax( q·k / √d  +  w[ i − j ] ) · v")
    d.words(280, 414, "w: a learned number for every head and every distance in rows and columns", small=True)
    return d


def efficientnet() -> Drawing:
    """After table 1 of the EfficientNet paper, and figure 4d of MobileNetV2's for the block."""
    d = Drawing(560, 560, "EfficientNet: stem, seven stages of MBConv, 1×1 convolution, mean and head")
    rows: list[Row] = [
        ("3×3 convolution, stride 2", "input", ""),
        ("MBConv1, 3×3", "mlp", "1 block, 16 channels"),
        ("MBConv6, 3×3, stride 2", "mlp", "2 blocks, 24"),
        ("MBConv6, 5×5, stride 2", "mlp", "2 blocks, 40"),
        ("MBConv6, 3×3, stride 2", "mlp", "3 blocks, 80"),
        ("MBConv6, 5×5", "mlp", "3 blocks, 112"),
        ("MBConv6, 5×5, stride 2", "mlp", "4 blocks, 192"),
        ("MBConv6, 3×3", "mlp", "1 block, 320"),
        ("1×1 convolution, mean, head", "head", "1280; B1 to L2: wider and deeper"),
    ]
    d.tower(16, 220, 8, rows, height=26)
    d.box(14, 424, 532, 126, "", "plain")
    d.words(24, 444, "MBConv6", anchor="start")
    x = 40.0
    parts: list[tuple[str, Kind, int]] = [
        ("1×1,\n6 × wider", "mlp", 90),
        ("depthwise\nk × k", "mlp", 90),
        ("squeeze-\nexcite", "attention", 90),
        ("1×1,\nno activation", "mlp", 110),
    ]
    for text, kind, width in parts:
        d.arrow((x, 486), (x + 16, 486))
        d.box(x + 16, 464, width, 44, text, kind)
        x += 16 + width
    d.arrow((x, 486), (x + 12, 486))
    d.sum(x + 21, 486)
    d.arrow((x + 30, 486), (x + 52, 486))
    d.arrow((30, 486), (40, 486), tip=False)
    d.arrow((36, 486), (36, 530), (x + 21, 530), (x + 21, 495))
    d.words(250, 545, "the shortcut, where stride and width stay as they are", small=True)
    return d


def wide_resnet() -> Drawing:
    """After table 1 and figure 1c of the paper."""
    d = Drawing(560, 300, "Wide-ResNet: a convolution, three stages of blocks, mean and head")
    d.tower(
        16,
        190,
        10,
        [
            ("3×3 convolution", "input", "16"),
            ("blocks × N", "mlp", "16 k channels"),
            ("blocks × N", "mlp", "32 k, half"),
            ("blocks × N", "mlp", "64 k, quarter"),
            ("norm, mean, head", "head", ""),
        ],
        height=34,
    )
    d.box(346, 30, 190, 240, "", "plain")
    d.words(440, 22, "one block")
    d.arrow((440, 38), (440, 62))
    layers: list[tuple[int, str, Kind]] = [
        (62, "norm, ReLU", "plain"),
        (108, "3×3 convolution", "mlp"),
        (154, "norm, ReLU", "plain"),
        (200, "3×3 convolution", "mlp"),
    ]
    for y, text, kind in layers:
        d.box(372, y, 138, 28, text, kind)
        d.arrow((440, y + 28), (440, y + 46 if y < 200 else 242))
    d.arrow((440, 46), (356, 46), (356, 251), (431, 251))
    d.sum(440, 251)
    d.arrow((440, 260), (440, 286))
    return d


FIGURES = {
    "vit": vit,
    "v-moe": v_moe,
    "cvt": cvt,
    "coatnet": coatnet,
    "efficientnet": efficientnet,
    "wide-resnet": wide_resnet,
}

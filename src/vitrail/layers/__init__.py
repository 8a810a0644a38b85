"""Building blocks, in plain torch.

Axes in shapes: `b` batch, `n` tokens, `d` width, `h w` rows and columns, `heads`, `dh` width of a head, `classes`.
"""

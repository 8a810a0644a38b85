"""Peers import beside a CPU-only torch, and compute on one thread."""

import os
from importlib.util import find_spec

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # random weights only: nothing may ask a network

torch.set_num_threads(1)  # tiny tensors: more threads only cost

# Without the peers nothing here can run, and collecting it would fail.
collect_ignore_glob = [] if find_spec("timm") and find_spec("transformers") else ["test_*.py"]

# torchvision registers fake kernels for these two operators of its compiled half, which a CPU-only torch cannot load;
# it imports once their names exist. Nothing calls them.
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for _operator in ("nms", "qnms"):
    _torchvision.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

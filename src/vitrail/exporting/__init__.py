"""Files that give the trained model's answers without Vitrail: torch.export, ONNX and OpenVINO.

The evaluation view is inside: a file takes pictures as they come, uint8, of any size, and gives logits. Decoding stays
outside, in the script that `export` writes beside the file. What is written has been asked about real pictures first,
by that script, and answered as the model does.
"""

from vitrail.exporting.formats import FORMATS, Precision
from vitrail.exporting.parity import Kind, Parity
from vitrail.exporting.writing import Export, NotExported, export

__all__ = ["FORMATS", "Export", "Kind", "NotExported", "Parity", "Precision", "export"]

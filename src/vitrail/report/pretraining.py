"""The page's sections about a model that was pre-trained without labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from vitrail.config.masked import MaskedConfig
from vitrail.models import ImageModel
from vitrail.report.figures import is_small, png_uri, thumbnail
from vitrail.report.sections import Section, data_rows, duration, short_number

SIDE = 120  # pixels of a picture's longer side


@dataclass(frozen=True)
class RestoredPicture:
    """A picture, what is left of it when patches are hidden, and how the model fills them in."""

    name: str
    original: UInt8[ndarray, "h w c"]
    masked: UInt8[ndarray, "h w c"]
    filled: UInt8[ndarray, "h w c"]


def pretraining_summary(
    metrics: Mapping[str, float], model: ImageModel, facts: Mapping[str, Any], seconds: float
) -> Section:
    """Return the headline and its cards."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cards = [
        ("Validation loss", f"{metrics['masked_loss']:.4f}", "of hidden patches; lower is better"),
        ("Parameters", *short_number(parameters)),
        ("Training time", duration(seconds), ""),
    ]
    pictures = f"{facts['train']:,} pictures" if "train" in facts else "pictures"
    sentence = f"Pre-trained on {pictures} by filling in hidden patches; no label was looked at."
    return {"sentence": sentence, "cards": cards}


def restored_section(restored: Sequence[RestoredPicture], recipe: object) -> Section | None:
    """Return the pictures as the template shows them, and what to know when looking at them; None without pictures."""
    if not restored:
        return None
    pictures = [
        {
            "name": each.name,
            "crisp": is_small(each.original),
            **{kind: png_uri(thumbnail(getattr(each, kind), SIDE)) for kind in ("original", "masked", "filled")},
        }
        for each in restored
    ]
    note = (
        "Each picture, then what is left of it when patches are hidden, then the hidden patches as the model fills "
        "them in at the end of the run. None of these pictures was trained on."
    )
    if isinstance(recipe, MaskedConfig) and recipe.objective == "pixels" and recipe.norm_targets:
        note += (
            " The model is asked for a patch's pattern only: the mean and contrast of each hidden patch are those of "
            "the true picture, so its rough colours are no merit of the model."
        )
    return {"pictures": pictures, "note": note}


def pretraining_data_section(facts: Mapping[str, object]) -> Section:
    """Return what the model was trained on."""
    return {"rows": data_rows(facts), "broken": [], "balance": "Labels were not used.", "balance_chart": None}

"""Optimizers that torch does not have, or not as the recipes need them."""

from vitrail.optimizers.adafactor import Adafactor
from vitrail.optimizers.adamw_8bit import AdamW8bit
from vitrail.optimizers.muon import Muon
from vitrail.optimizers.rmsprop import RMSProp

__all__ = ["Adafactor", "AdamW8bit", "Muon", "RMSProp"]

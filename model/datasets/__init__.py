"""Labelled music as its users have it on disk: one module a layout, one `Dataset` out of each.

from model.datasets import load
dataset = load(Path("fma_small"))
"""

from model.datasets.dataset import Clip, Dataset, LogMels, Skipped
from model.datasets.layouts import LAYOUTS, detect, load

__all__ = ["LAYOUTS", "Clip", "Dataset", "LogMels", "Skipped", "detect", "load"]

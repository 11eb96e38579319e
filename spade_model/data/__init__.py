"""Data sets, batches and the check of a data set."""

from spade_model.data.check import check_dataset
from spade_model.data.dataset import FolderDataset, SpadeDataset, ToyDataset, create_dataset, load_condition
from spade_model.data.loader import Loader, create_loader
from spade_model.data.problem import DataError, Problem
from spade_model.data.sample import Batch, Sample
from spade_model.data.toy import TOY_CLASSES

__all__ = [
    "TOY_CLASSES",
    "Batch",
    "DataError",
    "FolderDataset",
    "Loader",
    "Problem",
    "Sample",
    "SpadeDataset",
    "ToyDataset",
    "check_dataset",
    "create_dataset",
    "create_loader",
    "load_condition",
]

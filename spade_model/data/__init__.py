"""Data sets, batches and the check of a data set."""

from spade_model.data.check import check_dataset, inspect_dataset
from spade_model.data.dataset import FolderDataset, SpadeDataset, create_dataset, load_condition
from spade_model.data.layouts import ADE20K, CITYSCAPES, COCO, CUSTOM, FACADES, FileGroup, Layout
from spade_model.data.loader import Loader, create_loader
from spade_model.data.problem import DataError, Problem
from spade_model.data.sample import Batch, Sample
from spade_model.data.toy import TOY_CLASSES
from spade_model.data.toy.dataset import TOY, ToyDataset
from spade_model.registry import DATASETS, DatasetSpec

DATASETS["coco"] = COCO
DATASETS["ade20k"] = ADE20K
DATASETS["cityscapes"] = CITYSCAPES
DATASETS["facades"] = FACADES
DATASETS["custom"] = CUSTOM
DATASETS["toy"] = TOY

__all__ = [
    "DATASETS",
    "TOY_CLASSES",
    "Batch",
    "DataError",
    "DatasetSpec",
    "FileGroup",
    "FolderDataset",
    "Layout",
    "Loader",
    "Problem",
    "Sample",
    "SpadeDataset",
    "ToyDataset",
    "check_dataset",
    "create_dataset",
    "create_loader",
    "inspect_dataset",
    "load_condition",
]

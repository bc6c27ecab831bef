"""paperlib: the training data of a model, read back from its parameters.

A companion to "A Law of Data Reconstruction for Random Features (and Beyond)" by Iurada, Bombari,
Tommasi and Mondelli (ICLR 2026, arXiv 2509.22214). Its public names, in the order of an attack:
"""

# Data: each returns X (n, d) on the sphere, labels y, and what turns samples into pictures again.
# The model under attack: a feature map, and the training that gives its parameters.
from paperlib.activations import Activation, activation, activation_names

# The verdict: samples matched with the data, and the three errors of the paper.
from paperlib.compare import Comparison, compare, random_baseline
from paperlib.data import (
    DataSet,
    cifar10,
    digits,
    faces,
    image_folder,
    photographs,
    sphere,
)
from paperlib.feature_map import FeatureMap

# Figures and notebooks.
from paperlib.figures import (
    PALETTE,
    image_strip,
    mark_level,
    mark_threshold,
    save_figure,
    use_style,
)
from paperlib.given_features import GivenFeatures
from paperlib.min_norm import fit_min_norm
from paperlib.module_features import ModuleFeatures
from paperlib.networks import ResNet, TwoLayer, VisionTransformer
from paperlib.parameters import check_parameters

# The attack: the projection loss and its minimisation.
from paperlib.projection import projection_loss
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction

# Many runs.
from paperlib.results import export_results, read_store
from paperlib.sphere import to_sphere
from paperlib.sweep import sweep
from paperlib.training import Training, train, train_last_layer

__all__ = [
    "PALETTE",
    "Activation",
    "Comparison",
    "DataSet",
    "FeatureMap",
    "GivenFeatures",
    "ModuleFeatures",
    "RandomFeatures",
    "Reconstruction",
    "ResNet",
    "Training",
    "TwoLayer",
    "VisionTransformer",
    "activation",
    "activation_names",
    "check_parameters",
    "cifar10",
    "compare",
    "digits",
    "export_results",
    "faces",
    "fit_min_norm",
    "image_folder",
    "image_strip",
    "mark_level",
    "mark_threshold",
    "photographs",
    "projection_loss",
    "random_baseline",
    "read_store",
    "reconstruct",
    "save_figure",
    "sphere",
    "sweep",
    "to_sphere",
    "train",
    "train_last_layer",
    "use_style",
]

# ruff: noqa: I001 - in the order of an attack, not of the alphabet
"""paperlib: the training data of a model, read back from its parameters.

A companion to "A Law of Data Reconstruction for Random Features (and Beyond)" by Iurada, Bombari,
Tommasi and Mondelli (ICLR 2026, arXiv 2509.22214). Its public names, in the order of an attack.
"""

# Data: each loader returns X (n, d) on the sphere, labels y, and what shows samples as pictures.
from paperlib.data import (
    DataSet,
    cifar10,
    digits,
    faces,
    image_folder,
    photographs,
    sphere,
)
from paperlib.sphere import to_sphere

# The model under attack: a feature map, and the training that gives its parameters.
from paperlib.activations import Activation, activation, activation_names
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.random_features import RandomFeatures
from paperlib.given_features import GivenFeatures
from paperlib.module_features import ModuleFeatures
from paperlib.subspace import SubspaceFeatures
from paperlib.networks import Network, ResNet, TwoLayer, VisionTransformer
from paperlib.gradient_features import GradientFeatures
from paperlib.min_norm import fit_min_norm
from paperlib.training import Training, train, train_last_layer

# What an attacker may know of the data: a subspace near which they lie.
from paperlib.bases import cosine_basis, principal_basis

# What is released of the parameters.
from paperlib.quantise import quantise
from paperlib.privacy import gaussian_epsilon, private_ridge

# The attack: the projection loss and its minimisation.
from paperlib.projection import projection_loss
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.sample_count import SampleCount, estimate_sample_count
from paperlib.known_samples import reconstruct_unknown
from paperlib.releases import combine_releases, release_spectrum

# Earlier attacks on all layers, and one that takes the first layer apart.
from paperlib.first_layer_attack import first_layer_attack
from paperlib.gradient_matching import MatchedGradients
from paperlib.kkt_attack import kkt_attack
from paperlib.ntk_attack import ntk_attack

# The audit of a model of your own, from its checkpoints.
from paperlib.audit import Audit, audit
from paperlib.protections import protections

# The verdict: samples matched with the data, and the three errors of the paper.
from paperlib.compare import Comparison, compare, random_baseline

# The law itself: what the parameters determine.
from paperlib.identifiability import jacobian_spectrum, parameter_jacobian
from paperlib.law import least_parameters
from paperlib.walk import walk_explanations

# Figures and notebooks.
from paperlib.figures import (
    PALETTE,
    image_strip,
    mark_level,
    mark_threshold,
    save_figure,
    use_style,
)
from paperlib.frames import Frame, Frames
from paperlib.animation import film, save_animation
from paperlib.parameters import check_parameters

# Many runs.
from paperlib.sweep import sweep
from paperlib.results import export_results, read_store

__all__ = [
    "PALETTE",
    "Activation",
    "Audit",
    "Comparison",
    "DataSet",
    "FeatureBlock",
    "FeatureMap",
    "Frame",
    "Frames",
    "GivenFeatures",
    "GradientFeatures",
    "MatchedGradients",
    "ModuleFeatures",
    "Network",
    "RandomFeatures",
    "Reconstruction",
    "ResNet",
    "SampleCount",
    "SubspaceFeatures",
    "Training",
    "TwoLayer",
    "VisionTransformer",
    "activation",
    "activation_names",
    "audit",
    "check_parameters",
    "cifar10",
    "combine_releases",
    "compare",
    "cosine_basis",
    "digits",
    "estimate_sample_count",
    "export_results",
    "faces",
    "film",
    "first_layer_attack",
    "fit_min_norm",
    "gaussian_epsilon",
    "image_folder",
    "image_strip",
    "jacobian_spectrum",
    "kkt_attack",
    "least_parameters",
    "mark_level",
    "mark_threshold",
    "ntk_attack",
    "parameter_jacobian",
    "photographs",
    "principal_basis",
    "private_ridge",
    "projection_loss",
    "protections",
    "quantise",
    "random_baseline",
    "read_store",
    "reconstruct",
    "reconstruct_unknown",
    "release_spectrum",
    "save_animation",
    "save_figure",
    "sphere",
    "sweep",
    "to_sphere",
    "train",
    "train_last_layer",
    "use_style",
    "walk_explanations",
]

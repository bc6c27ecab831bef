"""Data sets: rows on the sphere of radius sqrt(d), labels, and the way back to pictures."""

from paperlib.data.cifar10 import cifar10
from paperlib.data.dataset import DataSet
from paperlib.data.digits import digits
from paperlib.data.faces import faces
from paperlib.data.image_folder import image_folder
from paperlib.data.photographs import photographs
from paperlib.data.sphere import sphere

__all__ = [
    "DataSet",
    "cifar10",
    "digits",
    "faces",
    "image_folder",
    "photographs",
    "sphere",
]

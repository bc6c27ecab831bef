"""One notebook under one profile: its files, its parameters, and whether it must run again."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
import yaml

from paperlib.notebook_source import tags

# The code that a notebook's results come from: Python, and what is compiled for it.
PACKAGE = Path(__file__).parent
CODE = {".py", ".cpp", ".h"}

# Folder beside the notebooks with runs that some of them only show.
STORED_RUNS = "stored_runs"

# Libraries whose version changes what a notebook computes.
LIBRARIES = ("numpy", "paperlib", "scikit-image", "scikit-learn", "scipy", "torch", "torchvision")


@dataclass(frozen=True)
class Job:
    """One notebook under one profile, and where its files are.

    Attributes:
        root: folder that holds ``notebooks/``.
        profile: name of the set of parameters.
        name: file name of the notebook without its ending.
    """

    root: Path
    profile: str
    name: str

    @property
    def notebook(self) -> Path:
        """The notebook as committed."""
        return self.root / "notebooks" / f"{self.name}.ipynb"

    @property
    def parameter_file(self) -> Path:
        """The profile's parameters; the file may be missing."""
        return self.root / "notebooks" / "parameters" / self.profile / f"{self.name}.yaml"

    @property
    def executed(self) -> Path:
        """The executed copy."""
        return self.root / "executed" / self.profile / f"{self.name}.ipynb"

    @property
    def record(self) -> Path:
        """What the executed copy was made of."""
        return self.executed.with_suffix(".json")

    @property
    def figures(self) -> Path:
        """Where the notebook's figures go: those of other profiles never replace the quick ones."""
        if "PAPERLIB_FIGURES" in os.environ:
            return Path(os.environ["PAPERLIB_FIGURES"]).absolute()
        folder = self.root / "figures"
        return folder if self.profile == "quick" else folder / self.profile

    def parameters(self) -> dict[str, object]:
        """The profile's parameters, none without a file.

        Raises:
            ValueError: if the file is not a mapping from names to values.
        """
        if not self.parameter_file.exists():
            return {}
        try:
            values = yaml.safe_load(self.parameter_file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"not YAML: {error}") from error
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise ValueError(f"expected lines NAME: VALUE, got a {type(values).__name__}")
        return values

    def key(self, parameters: Mapping[str, object] | None = None) -> str:
        """A hash of all that the result depends on: notebook, parameters, code, data, versions.

        Args:
            parameters: what `parameters` returned; if None, they are read now.
        """
        notebook = nbformat.read(self.notebook, as_version=4)
        cells = [[cell.cell_type, cell.source, tags(cell)] for cell in notebook.cells]
        parameters = self.parameters() if parameters is None else dict(parameters)
        code = [path for path in PACKAGE.rglob("*") if path.suffix in CODE]
        # Only a notebook that names the folder reads from it.
        named = STORED_RUNS in json.dumps([cells, parameters], default=str)
        stored = (self.notebook.parent / STORED_RUNS).glob("*.npz") if named else ()
        parts = {
            "cells": cells,
            "parameters": parameters,
            "package": {str(path.relative_to(PACKAGE)): file_hash(path) for path in code},
            "stored runs": {path.name: file_hash(path) for path in stored},
            "versions": library_versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def is_up_to_date(self) -> bool:
        """Whether the record holds: same key, executed copy untouched, its figures in place."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            return (
                record["key"] == self.key()
                and record["executed"] == file_hash(self.executed)
                and all((self.figures / name).is_file() for name in record["figures"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False  # no record, or one that was cut short: run again


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter."""
    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

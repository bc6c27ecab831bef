"""State dictionaries from files, and modules by name, without running what a file holds.

A checkpoint saved by `torch.save` is a pickle, and unpickling may run any code. So only
`torch.load(..., weights_only=True)` is used, which builds tensors and plain containers and refuses
everything else; a safetensors file holds nothing but tensors to begin with.
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from paperlib.damaged_files import DAMAGED

# Under these names training programs keep the state dictionary among other things.
WRAPPERS = ("state_dict", "model_state_dict", "model")

LISTED = 5  # names that an error message lists


def load_state_dict(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU.

    Args:
        source: path of a .safetensors file, path of a file of `torch.save`, or a state dictionary.
            A checkpoint that keeps it under "state_dict", "model_state_dict" or "model", or
            under another name as its only dictionary of tensors, is unwrapped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged, that holds pickled objects (they are refused, not
            run), or that holds no tensors.
        TypeError: for entries that are not tensors, or a source of another kind.
    """
    if isinstance(source, Mapping):
        return _only_tensors("the state dictionary", source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"expected a path or a state dictionary, got {type(source).__name__}")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        # Imported here: most of the library never needs it.
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _only_tensors(path.name, load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path.name} is no safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} was not read: it holds pickled objects beside tensors, and reading those "
            "may run any code, or it is no checkpoint. Expected torch.save(module.state_dict(), "
            "path) or safetensors"
        ) from error
    except DAMAGED as error:
        raise ValueError(
            f"{path.name} is damaged or no checkpoint: {type(error).__name__}: {error}"
        ) from error
    return _only_tensors(path.name, content)


def _only_tensors(name: str, content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise TypeError(f"{name} must hold a state dictionary, got {type(content).__name__}")
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _only_tensors(f"{name}[{wrapper!r}]", content[wrapper])
    if not content:
        raise ValueError(f"{name} holds no tensors")
    inner = [key for key, value in content.items() if _holds_tensors(value)]
    if len(inner) == 1 and not any(isinstance(value, Tensor) for value in content.values()):
        return _only_tensors(f"{name}[{inner[0]!r}]", content[inner[0]])
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(
            f"{name} must hold tensors alone, got {type(content[others[0]]).__name__} at "
            f"{_listed(others)}"
        )
    return {str(key): value.detach().cpu() for key, value in content.items()}


def _holds_tensors(value: object) -> bool:
    mapping = isinstance(value, Mapping) and bool(value)
    return mapping and all(isinstance(entry, Tensor) for entry in value.values())


def without_prefix(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state dictionary without what stands before all names of the module, where that is all.

    Wrappers of a module put it there: "module." (DataParallel), "_orig_mod." (torch.compile), or
    the name of an attribute, as "model.".
    """
    expected = set(module.state_dict())
    if not expected or set(state) == expected:
        return state
    one = min(expected)
    for prefix in {key[: -len(one)] for key in state if key.endswith(f".{one}")}:
        if {prefix + key for key in expected} == set(state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def check_states_fit(module: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """State dictionaries that belong to that module: same names, same shapes, finite values.

    Args:
        module: gives the names and shapes.
        states: the state dictionaries by what they are called in messages.

    Raises:
        ValueError: naming what is missing, too much, of another shape or not finite.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for name, state in states.items():
        missing = [key for key in expected if key not in state]
        surplus = [key for key in state if key not in expected]
        if missing or surplus:
            parts = [f"it lacks {_listed(missing)}"] if missing else []
            parts += [f"it has {_listed(surplus)} that the module has not"] if surplus else []
            raise ValueError(f"{name} does not fit the module: {', and '.join(parts)}")
        for key, shape in expected.items():
            if tuple(state[key].shape) != shape:
                raise ValueError(
                    f"{name}: {key!r} must have the module's shape {shape}, "
                    f"got {tuple(state[key].shape)}"
                )
            bad = int((~torch.isfinite(state[key])).sum())
            if bad:
                raise ValueError(
                    f"{name}: {key!r} must be finite, got {bad} entries that are NaN or infinite"
                )


def module_from(factory: str) -> nn.Module:
    """The module that a factory makes, named as "package.module:function".

    The package is imported and the function called, as `python -m` would: name only code of your
    own, or code you trust. Nothing is taken from a checkpoint.

    Args:
        factory: where the function (or class) is that is called without arguments.

    Raises:
        ValueError: for a name of another form, or one that cannot be found.
        TypeError: if what it returns is no module.
    """
    package, colon, name = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not (package and colon and name):
        raise ValueError(f'factory must be like "package.module:function", got {factory!r}')
    try:
        make = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"factory {factory!r} cannot be found: {error}") from error
    module = make()
    if not isinstance(module, nn.Module):
        raise TypeError(f"{factory} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + more

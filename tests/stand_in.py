"""A device beside the processor, played by it: what would fail on a GPU fails without one.

Tensors on it have a device of their own. As on a GPU, they do not mix with tensors elsewhere but
for numbers (tensors of no dimension), copies and indices, are no arrays of NumPy, and multiply no
matrices of whole numbers.
"""

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "stand_in"
CPU = torch.device("cpu")
aten = torch.ops.aten

# What takes tensors of several devices.
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
MULTIPLICATIONS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.addmm_.default,
    aten.baddbmm.default,
    aten.addmv.default,
    aten.mv.default,
    aten.dot.default,
    aten._int_mm.default,
}

# Made by torch from a size, not from other tensors.
FACTORIES = ["arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace"]
FACTORIES += ["_efficientzerotensor", "empty.memory_format", "empty_strided"]

# How many operations there were, for `Operations`.
_operations = 0


class OnStandIn(torch.Tensor):
    """A tensor of the stand-in, whose numbers are in `held`, a tensor of the processor."""

    @staticmethod
    def __new__(cls, held):
        """Of the shape of `held`, on another device."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
            requires_grad=held.requires_grad,
        )

    def __init__(self, held):
        """Hold it."""
        self.held = held

    def __repr__(self):
        """Its numbers."""
        return f"OnStandIn({self.held})"

    def __reduce_ex__(self, protocol):
        """As it comes back with map_location="cpu"."""
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        """Its numbers, which torch does not give of a class it does not know."""
        return self.held.tolist()

    def __format__(self, how):
        """The same of a number, as in f"{loss:.1e}"."""
        return format(self.held, how)

    def untyped_storage(self):
        """One for all views of it."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Run an operation that has a tensor of the stand-in among its arguments."""
        global _operations
        _operations += 1
        kwargs = dict(kwargs or {})
        there = _goes_there(operation, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        found = operation(*_held(args), **{name: _held(x) for name, x in kwargs.items()})
        if not there:
            return args[0] if operation is aten.copy_.default else found
        found = _moved(found)
        if operation is aten._to_copy.default or "device" in kwargs:
            return found
        return return_and_correct_aliasing(operation, args, kwargs, found)


def _held(x):
    """The arguments of an operation on the processor."""
    if isinstance(x, tuple | list):
        return type(x)(map(_held, x))
    return x.held if isinstance(x, OnStandIn) else x


def _moved(x):
    """The result of an operation, on the stand-in."""
    if isinstance(x, tuple | list):
        return type(x)(map(_moved, x))
    return OnStandIn(x) if isinstance(x, torch.Tensor) else x


def _tensors(x):
    """All tensors among arguments."""
    if isinstance(x, tuple | list):
        return [tensor for part in x for tensor in _tensors(part)]
    return [x] if isinstance(x, torch.Tensor) else []


def _goes_there(operation, args, kwargs):
    """Whether the result is on the stand-in; an error if a GPU would have refused the operation."""
    tensors = _tensors((*args, *kwargs.values()))
    mixed = any(not isinstance(x, OnStandIn) and x.ndim for x in tensors)
    if operation in INDEXED:
        if not isinstance(args[0], OnStandIn):
            raise RuntimeError(f"{operation}: indices on {NAME} of a tensor on the cpu")
    elif mixed and operation not in COPIES:
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
    if operation in MULTIPLICATIONS and not tensors[0].dtype.is_floating_point:
        raise RuntimeError(f"{operation} is not implemented on {NAME} for {tensors[0].dtype}")
    if operation is aten.linalg_lstsq.default and kwargs.get("driver") not in (None, "gels"):
        raise RuntimeError(f"{operation}: {NAME} has no driver {kwargs['driver']}")
    if operation is aten.copy_.default:
        return isinstance(args[0], OnStandIn)
    asked = kwargs.get("device")
    return asked is None or torch.device(asked).type == NAME


class Operations:
    """How many operations the stand-in ran within: `with Operations() as ran: ...; ran.count`."""

    def __enter__(self):
        """Begin to count."""
        self._before = _operations
        return self

    def __exit__(self, *error):
        """Count."""
        self.count = _operations - self._before


def _factory(name):
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def make(*args, device=None, layout=None, pin_memory=None, **kwargs):
        return OnStandIn(operation(*args, device=CPU, **kwargs))

    return make


def _copy_from(source, target, non_blocking=False):
    """Behind `copy_`, where torch leaves the class of a tensor aside."""
    _held(target).copy_(_held(source))
    return target


class Backend:
    """What torch asks of the module of a device, here of one that has no state of its own."""

    def is_available(self):
        return True

    is_initialized = is_available

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_rng_state(self, device=None):
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass


_library = torch.library.Library("aten", "IMPL")
_registered = False


def register():
    """Tell torch of the device, where it takes some made in Python.

    It counts devices when it first goes backward, so this has to come before any test.
    """
    global _registered
    _registered = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    if _registered:
        backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
        for name in FACTORIES:
            _library.impl(name, _factory(name), "PrivateUse1")
        _library.impl("_copy_from", _copy_from, "PrivateUse1")


def device():
    """The device; the test that asks is skipped where there is none."""
    if not _registered:
        pytest.skip("this torch knows no devices made in Python")
    return torch.device(NAME, 0)

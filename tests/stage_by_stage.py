"""The default solver on one problem, with the options of `reconstruct`, and parts of it."""

from paperlib.progress import Progress
from paperlib.second_order import SecondOrderSolver


def kept_bytes(point):
    """Bytes of what an evaluation keeps of its activations."""
    return sum(array.nbytes for array in point._kept.arrays)


def second_order_solver(model, theta, n, **options):
    """For tests of its stages, one by one."""
    defaults = {
        "seed": 0,
        "restarts": 1,
        "start": "auto",
        "max_steps": 100,
        "tolerance": 1e-10,
        "oversampling": 1.4,
        "lift": None,
        "bulk": "auto",
        "keep": "auto",
        "forcing": 0.2,
        "progress": Progress(False),
    }
    return SecondOrderSolver(model, theta, n, **defaults | options)

"""The default solver on one problem, with the options of `reconstruct`, and parts of it."""

from paperlib.attempts import SEARCH, Attempt
from paperlib.progress import Progress
from paperlib.second_order import SecondOrderSolver
from paperlib.stages import stage_record


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


def with_outcomes(solver, monkeypatch, outcome):
    """Put `outcome(kind, k)`, samples and loss of start k, in place of all starts of a solver.

    Returns the kinds, "search", "messages" or "random", of the starts as they are made.
    """
    made = []

    def start(kind):
        def attempt(*arguments):
            k = len(made)
            made.append(kind)
            if kind == "search":  # the order of starts follows from the log
                solver._log(stage_record(SEARCH, solver.bulk, "done", 1.0, 14, 9, 0.1, k))
            return Attempt(*outcome(kind, k), k)

        return attempt

    monkeypatch.setattr(solver, "_attempt_in_subspaces", start("search"))
    monkeypatch.setattr(solver, "_attempt_by_messages", start("messages"))
    monkeypatch.setattr(solver, "_attempt", start("random"))
    return made

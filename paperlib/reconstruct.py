"""`reconstruct`: the training data, read back from trained parameters."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor

from paperlib.checks import check_count, check_positive, check_range, check_theta
from paperlib.feature_map import FeatureMap
from paperlib.law import determines
from paperlib.memory import KEPT
from paperlib.progress import Progress
from paperlib.published import published_options
from paperlib.record import Reconstruction, conclude
from paperlib.saved_attack import SavedAttack, open_attack
from paperlib.second_order import OVERSAMPLING, SecondOrderSolver

STARTS = ("auto", "random", "subspace", "messages")

TOLERANCE = {torch.float32: 1e-10, torch.float64: 1e-20}


def reconstruct(
    model: FeatureMap,
    theta: Tensor,
    n: int,
    *,
    solver: str = "levenberg-marquardt",
    seed: int = 0,
    tolerance: float | None = None,
    progress: bool | None = None,
    callback: Any = None,
    resume: str | os.PathLike | None = None,
    **options: Any,
) -> Reconstruction:
    """Find n inputs whose features span the parameters: minimise the projection loss.

    Args:
        model: the feature map phi, known to the attacker.
        theta: trained minus initial parameters, (C, p), or (p,) for one output.
        n: the number of training samples, or a guess of it.
        solver: "levenberg-marquardt" (second order, see `second_order.py`) or "published" (the
            paper's momentum gradient descent, see `published.py`).
        seed: seed of the random candidates, and of nothing else.
        tolerance: loss at which the parameters count as explained; 1e-10 for a float32 model,
            1e-20 for float64, 1e-7 for the published solver.
        progress: draw a progress bar on work longer than two seconds; if None, unless
            PAPERLIB_PROGRESS=0 is set.
        callback: called after every step with (stage, loss, candidates).
        resume: a folder in which the attack is kept while it runs, at most every half minute. An
            attack that was stopped, whatever stopped it, goes on from there when it is called
            again with the same arguments; one that has ended returns its result at once. Only
            message passing or a search, of the stages, begins anew.
        **options: for "levenberg-marquardt": `restarts`, `start`, `max_steps`, `oversampling`,
            `lift`, `bulk`, `keep`, `forcing` (see `second_order_options`); for "published":
            `learning_rate`, `momentum`, `max_steps`, `relu_slope`, `restarts` (see
            `published_options`).

    Returns:
        A `Reconstruction`. Its status claims no more than the loss and the count of numbers show.

    Raises:
        ValueError: for an unknown solver, n < 1, p < n, theta of the wrong shape, with values
            that are not finite, or zero; for an option or a seed out of its range.
        TypeError: for theta that is no tensor or of another dtype than the model, n or a seed that
            is no whole number, or an option that the solver does not know.
        OSError: if the folder of `resume` cannot be written.
        MemoryError: if the attack would not fit into the free memory.
    """
    theta = check_theta(theta, model)
    n = check_count("n", n)
    seed = check_count("seed", seed, least=0)
    if model.p < n:
        raise ValueError(f"p must be at least n: {model.p} features cannot hold {n} samples")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: expected one of {sorted(SOLVERS)}")
    known = inspect.signature(SOLVERS[solver]).parameters
    allowed = sorted(name for name in known if known[name].kind is inspect.Parameter.KEYWORD_ONLY)
    internal = {"seed", "tolerance", "watch", "saved"}
    for name in options:
        if name not in allowed or name in internal:
            expected = ", ".join(a for a in allowed if a not in internal)
            raise TypeError(f"solver {solver!r} has no option {name!r}: expected {expected}")
    if tolerance is None:
        tolerance = 1e-7 if solver == "published" else TOLERANCE[model.dtype]
    check_positive("tolerance", tolerance, below=1.0)
    chosen = {
        "solver": solver,
        "n": n,
        "seed": seed,
        "tolerance": tolerance,
        **{k: v.default for k, v in known.items() if k in allowed and k not in internal},
        **options,
        "model": model.describe(),
    }
    saved = open_attack(resume, theta, model, **chosen)
    found = saved.result
    # A solver that keeps no state between its steps has only its result kept.
    kept = {"saved": saved} if "saved" in known else {}
    if found is None:
        with Progress(progress, callback) as watch:
            found = SOLVERS[solver](
                model, theta, n, seed=seed, tolerance=tolerance, watch=watch, **kept, **options
            )
        found["seconds"] = saved.seconds
        saved.finish(found)
    identifiable = determines(model, theta, n)
    return Reconstruction(
        samples=found["samples"].to(theta),
        loss=found["loss"],
        status=conclude(
            found["loss"],
            tolerance,
            identifiable=identifiable,
            agreed=found.get("agreed", False),
        ),
        explained=found["loss"] <= tolerance,
        identifiable=identifiable,
        history=found["history"],
        stages=found["stages"],
        passes=found["passes"],
        seconds=found["seconds"],
        restart=found["restart"],
        options=chosen,
        elimination_losses=found["elimination_losses"],
    )


def second_order_options(
    model: FeatureMap,
    theta: Tensor,
    n: int,
    *,
    seed: int,
    tolerance: float,
    watch: Progress,
    saved: SavedAttack | None = None,
    restarts: int | None = None,
    start: str = "auto",
    max_steps: int = 200,
    oversampling: float = OVERSAMPLING,
    lift: bool | None = None,
    bulk: str = "auto",
    keep: str = "auto",
    forcing: float = 0.2,
) -> dict[str, Any]:
    """The default solver and its options.

    Args:
        model: the feature map.
        theta: (C, p).
        n: number of samples.
        seed: seed of the candidates.
        tolerance: loss at which restarts end.
        watch: progress.
        saved: the file that the attack is kept in, and goes on from.
        restarts: most starts; the best by loss is returned. They end early when the parameters
            are explained, or when two independent starts found the same samples (three, if they
            begin alike: searches or message passing). If None, 20 where all starts are made by
            message passing, and 5 otherwise.
        start: "random" starts from random candidates; "subspace" by searches in the few
            directions that stand out (see `subspace_search.py`) and "messages" by message passing
            (see `message_passing.py`, and for what follows below 2.5 d n, `exchange.py`), which
            both need random features and an activation with a second moment. "auto", where they
            apply: by message passing for p between 1 and 2.5 d n; above, the first start is by
            searches if those are smaller problems than the whole one (n well below d), the second
            too if the first led nowhere, and every second other one by message passing.
        max_steps: most linear solves in one stage of one restart.
        oversampling: candidates per sample in the bulk stage (1.3 to 1.5 work best).
        lift: project the linear part off; if None, where the activation has one and p allows.
        bulk: arithmetic of the bulk stage: "auto", "bfloat16", "float16" (V stored in half the
            bytes, arithmetic in float32), "float32", "float64", or "int8" (for the products
            inside the linear solves; loss and gradient in float32). "auto" is the fastest that
            the device has instructions for (see `precision.py`). Searches that leave samples
            missing in "bfloat16" go on in float32.
        keep: what stays of the activations between passes: "features and slopes", the "inputs"
            that both follow from, "nothing" (half as long again), or "auto", by what fits.
        forcing: relative residual of the inner linear solves.

    Raises:
        ValueError: for an option out of its range, or a start or a lift that the model cannot have.
        TypeError: for an option of another type.
        MemoryError: if the attack would not fit into the free memory.
    """
    if restarts is not None:
        check_count("restarts", restarts)
    check_count("max_steps", max_steps)
    check_positive("forcing", forcing, below=1.0)
    check_range("oversampling", oversampling, least=1)
    if keep not in ("auto", *KEPT):
        raise ValueError(f"keep must be one of {('auto', *KEPT)}, got {keep!r}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if lift not in (None, True, False):
        raise TypeError(f"lift must be True, False or None, got {lift!r}")
    run = SecondOrderSolver(
        model,
        theta,
        n,
        seed=seed,
        restarts=restarts,
        start=start,
        max_steps=max_steps,
        tolerance=tolerance,
        oversampling=oversampling,
        lift=lift,
        bulk=bulk,
        keep=keep,
        forcing=forcing,
        progress=watch,
        saved=saved,
    )
    best = run.solve()
    return {
        "samples": best.X,
        "loss": best.loss,
        "history": run.history,
        "stages": run.stages,
        "passes": run.passes,
        "restart": best.restart,
        "agreed": best.agreed,
        "elimination_losses": best.elimination_losses,
    }


SOLVERS = {"levenberg-marquardt": second_order_options, "published": published_options}

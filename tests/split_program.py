"""Run by every process of `torchrun` in test_split.py: one attack on features that are split."""

import json
import sys

import torch
import torch.distributed as dist

import paperlib
from paperlib.exchange import split_directions
from paperlib.projection import Linearization

torch.set_num_threads(1)
dist.init_process_group("gloo")
data = paperlib.sphere(6, 40, seed=3)
model = paperlib.RandomFeatures(40, 3000, seed=5, block_rows=1024, group=dist.group.WORLD)
theta = paperlib.fit_min_norm(model, data.X, data.y)
found = paperlib.reconstruct(model, theta, 6, seed=1, progress=False)
point = Linearization(model, theta, paperlib.sphere(4, 40, seed=6).X)
directions, gains, _ = split_directions(
    model, point.residual, point.X, point.alpha, generator=torch.Generator().manual_seed(0)
)
rank = dist.get_rank()
result = {
    "features_held": model.features_held,
    "theta": theta.tolist(),
    "features": model.features(data.X).tolist(),
    "samples": found.samples.tolist(),
    "loss": found.loss,
    "explained": found.explained,
    "passes": found.passes,
    "directions": directions.tolist(),
    "gains": gains.tolist(),
}
with open(f"{sys.argv[1]}/rank{rank}.json", "w") as out:
    json.dump(result, out)
dist.destroy_process_group()

"""Every chapter with a parameter `device` runs beside the processor, at sizes that take seconds."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import stand_in

from paperlib.notebook_source import code_cells, declared_parameters, tags

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"

BRIEF = {"seeds": [0], "restarts": 1, "max_steps": 2, "max_train_steps": 10}
SMALL = {
    "00_reconstruct_in_a_minute": {"dataset": "digits", "n": 4, "second_n": 3},
    "01_law_of_data_reconstruction": BRIEF
    | {
        "sizes": [[4, 12]],
        "p_over_n": [0.5, 1.0],
        "p_over_dn": [0.5, 5.0],
        "published_p_over_dn": [2.0],
        "published_max_steps": 20,
    },
    "02_reconstructed_images": {"n": 3, "size": 8, "p_over_dn": [0.5, 5.0], "restarts": 1},
    "05_two_layer_network": BRIEF
    | {
        "n": 3,
        "p_over_dn": [0.3, 3.0],
        "last_p_over_dn": [3.0],
        "strip_n": 3,
        "strip_p_over_dn": [5.0],
        "strip_restarts": 1,
        "binary_restarts": 1,
    },
    "06_residual_network": BRIEF
    | {
        "n": 2,
        "blocks": 1,
        "p_over_dn": [0.3, 3.0],
        "zero_p_over_dn": [3.0],
        "last_p_over_dn": [3.0],
        "halfway_p_over_dn": [3.0],
        "last_restarts": 1,
        "halfway_restarts": 1,
        "drift_p_over_dn": 3.0,
        "strip_p_over_dn": 3.0,
    },
    "07_vision_transformer": BRIEF
    | {
        "n": 2,
        "outputs": 2,
        "p_over_dn": [0.5, 3.0],
        "zero_p_over_dn": [3.0],
        "last_p_over_dn": [3.0],
        "small_p_over_dn": [3.0],
        "strip_p_over_dn": 3.0,
        "strip_seeds": [0],
    },
    "08_classification_losses": BRIEF
    | {
        "n": 3,
        "p_over_dn": [1.0],
        "squared_from": 1.0,
        "all_p_over_dn": [0.1],
        "long_p_over_dn": 1.0,
        "targets": [0.3],
        "strip_n": 3,
        "strip_p_over_dn": 1.0,
        "strip_targets": [0.3],
        "rank_n": 3,
        "rank_outputs": [2, 3],
    },
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_all_chapters_with_a_device_are_here():
    with_device = {
        path.stem
        for path in NOTEBOOKS.glob("*.ipynb")
        if "device" in declared_parameters(read(path.stem))
    }
    assert with_device == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_chapter_runs_on_a_device(name, tmp_path, monkeypatch):
    device = stand_in.device()
    monkeypatch.setenv("PAPERLIB_FIGURES", str(tmp_path))
    monkeypatch.setenv("PAPERLIB_PROGRESS", "0")
    monkeypatch.chdir(tmp_path)
    scope = {"display": lambda *anything: None}
    claims = 0
    with stand_in.Operations() as ran:
        for cell in code_cells(read(name)):
            try:
                exec(compile(cell.source, name, "exec"), scope)
            except AssertionError:
                assert "status" not in cell.source  # of the cells of a sweep
                claims += 1  # of what larger runs find
            if "parameters" in tags(cell):
                scope |= SMALL[name] | {"device": str(device)}
    plt.close("all")
    assert claims <= 1 and ran.count > 1000
    assert list(tmp_path.glob("*.png"))

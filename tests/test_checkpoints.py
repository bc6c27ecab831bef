"""Checkpoints: what is read, and what is refused before it can do harm."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paperlib.checkpoints import (
    check_states_fit,
    load_state_dict,
    module_from,
    without_prefix,
)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def same(state, expected):
    return state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )


def test_files_and_dictionaries_hold_the_same_tensors(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "b.ckpt")
    save_file(state, tmp_path / "c.safetensors")
    for source in ("a.pt", "b.ckpt", "c.safetensors"):
        assert same(load_state_dict(tmp_path / source), state)
        assert same(load_state_dict(str(tmp_path / source)), state)
    assert same(load_state_dict(state), state)


@pytest.mark.parametrize("format", ["torch", "pickle"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, format):
    path, trap = tmp_path / "evil.pt", tmp_path / "trap"
    content = {"0.weight": torch.ones(2), "extra": Trap(trap)}
    if format == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="pickled objects"):
        load_state_dict(path)
    assert not trap.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"Expected torch.save\(module.state_dict\(\)"):
        load_state_dict(tmp_path / "module.pt")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_state_dict(tmp_path / "nothing.pt")
    (tmp_path / "empty.pt").touch()
    torch.save(network().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights, but not in the right format")
    (tmp_path / "table.pt").write_bytes(b"accuracy,loss\n")  # an IndexError of the unpickler
    (tmp_path / "int.pt").write_bytes(b"J12")  # a struct.error
    (tmp_path / "protocol.pt").write_bytes(b"\x80\x02\x8a\x0a")
    (tmp_path / "zip.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-30])
    for name in [path.name for path in tmp_path.iterdir() if path.name != "whole.pt"]:
        with pytest.raises(ValueError, match=name):
            load_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([torch.ones(2)], TypeError, "state dictionary, got list"),
        ({"a": torch.ones(2), "lr": 0.1}, TypeError, "tensors alone, got float at 'lr'"),
        ({}, ValueError, "no tensors"),
    ],
)
def test_contents_that_are_no_state_dictionary_are_refused(tmp_path, content, error, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(error, match=message):
        load_state_dict(tmp_path / "x.pt")


def test_another_kind_of_source_is_refused():
    with pytest.raises(TypeError, match="path or a state dictionary, got Sequential"):
        load_state_dict(network())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("2.bias"), "after does not fit the module: it lacks '2.bias'"),
        (lambda s: s.update(more=torch.ones(1)), "it has 'more' that the module has not"),
        (lambda s: s.update({"2.weight": torch.ones(2, 5)}), r"shape \(2, 4\), got \(2, 5\)"),
        (lambda s: s["0.weight"].fill_(torch.nan), "'0.weight' must be finite, got 12 entries"),
    ],
)
def test_states_that_do_not_fit_are_refused(change, message):
    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    after = dict(before) | {k: v.clone() for k, v in before.items()}
    change(after)
    with pytest.raises(ValueError, match=message):
        check_states_fit(module, {"before": before, "after": after})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_taken_off(prefix):
    plain = network().state_dict()
    wrapped = {prefix + key: value for key, value in plain.items()}
    found = without_prefix(wrapped, network())
    assert list(found) == list(plain) and all(found[key] is plain[key] for key in plain)
    assert without_prefix(plain, network()) is plain
    # Where something else is there, too, it is not clear what is meant.
    more = wrapped | {"loss.weight": torch.ones(1)}
    assert without_prefix(more, network()) is more
    with pytest.raises(ValueError, match="lacks '0.weight'.* and it has"):
        check_states_fit(network(), {"before": more})


def test_the_only_dictionary_of_tensors_is_taken(tmp_path):
    state = network().state_dict()
    torch.save({"net": state, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "x.pt")
    assert same(load_state_dict(tmp_path / "x.pt"), state)
    torch.save({"net": state, "average": state}, tmp_path / "two.pt")
    with pytest.raises(TypeError, match="got OrderedDict at 'net', 'average'"):
        load_state_dict(tmp_path / "two.pt")


def test_modules_by_name():
    module = module_from("paperlib.experiments.audit:perceptron")
    assert isinstance(module[2], nn.Linear)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("perceptron", ValueError, "package.module:function"),
        (":f", ValueError, "package.module:function"),
        (3, ValueError, "package.module:function"),
        ("no_such_package:f", ValueError, "cannot be found"),
        ("paperlib.checkpoints:no_such", ValueError, "cannot be found"),
        ("collections:OrderedDict", TypeError, "torch.nn.Module, got OrderedDict"),
    ],
)
def test_names_of_no_module_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        module_from(name)

"""Optimizer state of foreign checkpoints: what is refused of it, and the progress that comes with it."""

from __future__ import annotations

import pytest
import torch
from support.interop_models import VOCAB
from support.megatron_files import arguments, with_adam, write_classic

from megatron_lite.runs.manifest import read_manifest

pytestmark = pytest.mark.slow

SIZE = ("--vocab-size", str(VOCAB))


def test_optimizer_state_of_other_weights(original, refused, imported, tmp_path):
    state, model, _, _ = original(dtype="bf16")
    for kind in ("main_param", "exp_avg", "exp_avg_sq"):
        state |= {f"optimizer.{kind}.{name}": t.float() for name, t in list(state.items()) if "optimizer" not in name}
    state["optimizer.main_param.decoder.final_norm.weight"] += 1
    edit = with_adam(state, model, 1, 1, 3)
    write_classic(tmp_path / "m", state, model, args=arguments(model), edit=edit)
    refused(tmp_path / "m", "final_norm.weight differs from its weight by up to 1.*--weights-only", *SIZE)
    assert not imported(tmp_path / "m", tmp_path / "ck", *SIZE, weights_only=True)[0].goes_on


OPTIMIZERS = {
    "no moments": (
        lambda o: [entry.pop("exp_avg_sq") for entry in o["state"].values()],
        "without exp_avg and exp_avg_sq",
    ),
    "no step": (lambda o: [entry.pop("step") for entry in o["state"].values()], "has no number of optimizer steps"),
    "two steps": (lambda o: o["state"][0].update(step=9), r"different numbers of optimizer steps .3, 9"),
    "a group too few": (lambda o: o["param_groups"].pop(), "has no optimizer state of"),
    "other shapes": (lambda o: o["state"][0].update(exp_avg=torch.ones(2, 2)), "that do not match the parameters"),
    "nothing known": (lambda o: o.pop("param_groups"), "has an optimizer with state"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_are_refused(name, original, refused, tmp_path):
    change, text = OPTIMIZERS[name]
    state, model, _, _ = original()
    for kind in ("exp_avg", "exp_avg_sq"):
        state |= {f"optimizer.{kind}.{n}": t.clone() for n, t in list(state.items()) if "optimizer" not in n}
    adam = with_adam(state, model, 1, 1, 3)

    def edit(content, rank, stage):
        adam(content, rank, stage)
        change(content["optimizer"])

    write_classic(tmp_path / "m", state, model, args=arguments(model), edit=edit)
    refused(tmp_path / "m", f"{text}.*--weights-only", *SIZE)


def test_consumed_samples(original, imported, refused, tmp_path):
    """Old files do not say them: iteration times global batch size."""
    state, model, _, _ = original()
    for kind in ("exp_avg", "exp_avg_sq"):
        state |= {f"optimizer.{kind}.{n}": t.clone() for n, t in list(state.items()) if "optimizer" not in n}
    args = arguments(model, consumed_train_samples="absent", global_batch_size="absent")
    write_classic(tmp_path / "m", state, model, args=args, edit=with_adam(state, model, 1, 1, 3))
    refused(tmp_path / "m", "--global-batch-size with the value of the run", *SIZE)
    _, source = imported(tmp_path / "m", tmp_path / "ck", *SIZE, "--global-batch-size", "8")
    scalars = read_manifest(source.path).scalars
    expected = {"iteration": 7, "consumed_train_samples": 56, "consumed_train_tokens": 56 * 32}
    expected |= {"applied_samples": 12, "applied_iterations": 3, "skipped_iterations": 4}
    assert {name: scalars["progress"][name] for name in expected} == expected
    assert scalars["engine"] == {"step": 3, "loss_scaler": {"kind": "constant"}}

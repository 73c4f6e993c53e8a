"""Trained parameters in the place of the model's own: what changes, what stays, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite


class Net(nn.Module):
    """A tied head, a norm with buffers, and a module whose parameters another one runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.scale = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        h = torch.nn.functional.linear(h, self.scale.weight)
        return self.head(self.norm(h.transpose(1, 2)).transpose(1, 2))


IDS = [fz.Input("ids", ("batch", 5), "int64", 0, 8)]
X = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(1))


def new(model: nn.Module, *names: str, amount: float = 0.3) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(2), model.state_dict()
    return {name: state[name] + amount * torch.rand(state[name].shape, generator=generator) for name in names}


def compiled(tensors: dict[str, Tensor], file: Path, at: Any) -> Compilation:
    safetensors.torch.save_file(tensors, file)
    plan = fz.Plan(IDS, [fz.Replace(at=at, weights=file)], targets=())  # type: ignore[arg-type]
    return rewrite(Net().eval(), plan, verify="full")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trained.safetensors"


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_parameters_are_those_of_the_file(prefix: str, file: Path) -> None:
    model = Net().eval()
    names = ("norm.weight", "norm.running_var", "scale.weight", "attend.in_proj_weight", "attend.out_proj.weight")
    tensors = new(model, *names)
    counter = {"norm.num_batches_tracked": torch.tensor(3)}
    done = compiled({prefix + key: value for key, value in (tensors | counter).items()}, file,
                    ["norm", "scale", "attend", "attend.out_proj"])  # fmt: skip
    before = model(X)
    model.load_state_dict(model.state_dict() | tensors)
    after = model(X)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(done.program.run(X)[0], after.detach(), rtol=1e-5, atol=1e-5)
    assert done.lossless
    rows = {row.site: row.outcome for row in done.ledger if row.step == "replace"}
    assert rows == dict.fromkeys(("attend", "attend.out_proj", "scale", "norm"), "rewritten")


@pytest.mark.parametrize("path", ["embed", "head"])
def test_a_tied_parameter_changes_for_the_named_module_only(path: str, file: Path) -> None:
    model = Net().eval()
    value = new(model, f"{path}.weight")[f"{path}.weight"]
    done = compiled({f"{path}.weight": value}, file, path)
    model.get_submodule(path).weight = nn.Parameter(value)
    torch.testing.assert_close(done.program.run(X)[0], model(X).detach(), rtol=1e-5, atol=1e-5)
    assert "keeps the old ones" in next(row.detail for row in done.ledger if row.step == "replace")


def test_files_that_do_not_fit_are_refused(file: Path) -> None:
    model = Net()

    def refused(at: Any = "scale", **tensors: Tensor) -> str:
        with pytest.raises(fz.PlanError) as caught:
            compiled({key.replace("__", "."): value for key, value in tensors.items()}, file, at)
        return str(caught.value)

    weight = model.scale.weight.detach()
    assert "holds no parameters of norm" in refused(["scale", "norm"], scale__weight=weight)
    assert "has shape (2, 4), but (4, 4) is needed" in refused(scale__weight=weight[:2].clone())
    assert "scale.gain: the model reads no such parameter" in refused(scale__gain=weight)
    assert "holds NaN or Inf" in refused(scale__weight=weight / 0)
    assert "no module matches 'sclae'" in refused("sclae", scale__weight=weight)

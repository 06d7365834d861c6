"""The moving average against its closed form, and the guarantee that swapping always gives the weights back."""

import pytest
import torch
from torch import nn

from ldm.runs.checkpoints.files import CheckpointError
from ldm.training.ema import EMA


class Scale(nn.Module):
    """One weight and one persistent buffer."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.tensor(0.0), persistent=False)


def test_constant_decay_has_its_closed_form() -> None:
    model = Scale(0.0)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for step in range(1000, 1008):  # far beyond the ramp: decay 0.5, so s = 1 − 0.5^n
        ema.update(step)
    torch.testing.assert_close(ema.state()["weight"], torch.full((3,), 1.0 - 0.5**8))


def test_ramp_follows_the_formula_in_float64() -> None:
    model = Scale(0.0)
    ema, shadow = EMA(model, decay=0.9), 0.0
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step % 7))
        ema.update(step)
        d = min(0.9, (1 + step) / (10 + step))
        shadow = d * shadow + (1 - d) * (step % 7)
        torch.testing.assert_close(ema.state()["weight"], torch.full((3,), shadow), rtol=1e-6, atol=1e-6)


def test_average_of_half_precision_weights_is_kept_in_float32() -> None:
    model = Scale(1.0, torch.bfloat16)
    ema = EMA(model, decay=0.9999)
    with torch.no_grad():
        model.weight.fill_(1.0 + 2.0**-7)
    ema.update(10**6)
    assert ema.state()["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.state()["weight"], torch.full((3,), 1.0 + 1e-4 * 2.0**-7), rtol=0, atol=1e-7)


def test_buffers_are_copied_and_scratch_ones_left_out() -> None:
    model = Scale(0.0)
    ema = EMA(model, decay=0.9)
    assert isinstance(model.count, torch.Tensor)
    model.count.fill_(5)
    ema.update(1)
    assert set(ema.state()) == {"weight", "count"} and int(ema.state()["count"]) == 5


def test_average_does_not_follow_the_model_by_itself() -> None:
    model = Scale(2.0)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.zero_()
    assert ema.state()["weight"].tolist() == [2.0] * 3


def test_a_call_computes_with_the_average_and_leaves_the_weights() -> None:
    model = nn.Linear(3, 2)
    ema, x = EMA(model, decay=0.9), torch.randn(4, 3)
    expected = model(x)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1.0)
    assert torch.equal(ema(x), expected) and not ema(x).requires_grad
    assert torch.equal(model(x), torch.ones(4, 2)) and model(x).requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_swap_puts_the_average_in_and_the_weights_back(fails: bool) -> None:
    model = Scale(2.0)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
    address = model.weight.data_ptr()
    try:
        with ema.swap(model):
            assert model.weight.tolist() == [2.0] * 3
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert model.weight.tolist() == [3.0] * 3 and model.weight.data_ptr() == address
    assert ema.state()["weight"].tolist() == [2.0] * 3


def test_swap_into_a_wrong_model_leaves_it_as_it_was() -> None:
    ema, other = EMA(Scale(2.0), decay=0.9), nn.Linear(2, 2)
    before = other.weight.detach().clone()
    with pytest.raises(CheckpointError, match="is missing"), ema.swap(other):
        pass
    assert torch.equal(other.weight, before)


def test_copy_to_another_model_and_state_round_trip() -> None:
    ema, fresh = EMA(Scale(2.0), decay=0.9), Scale(0.0)
    other = EMA(fresh, decay=0.9)
    other.load({name: t.clone() for name, t in ema.state().items()})
    other.copy_to(fresh)
    assert fresh.weight.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "weight of the model is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not a weight"),
        (lambda s: s.update(weight=torch.zeros(2)), r"weight has shape \(2,\)"),
    ],
)
def test_load_is_strict(change: object, message: str) -> None:
    ema = EMA(Scale(2.0), decay=0.9)
    state = ema.state()
    change(state)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        ema.load(state)
    assert ema.state()["weight"].tolist() == [2.0] * 3

"""Whatever breaks in the capture, training goes on with the same losses, and the fault is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from capture_kit import Captured, capturing, make_model, token_batch

from nla_monitor.capture import assembly, budget, capture, held, planning, sampling, staging, tap
from nla_monitor.capture.session import SessionRegistry
from nla_monitor.records import ActivationSample, AgentContext

STEPS = 3


class _InjectedError(RuntimeError):
    pass


def _fail(*_: object, **__: object) -> Any:
    raise _InjectedError("injected")


# Where it breaks, and where the guard counts it: on the way of every forward,
ANYWHERE = [
    (capture.Capture, "begin", "capture.plan"),
    (capture.Capture, "tap", "capture.tap"),
    (capture.Capture, "end", "capture.stage"),
    (tap._BeginHook, "bind", "capture.plan"),
    (staging.Stager, "put_nowait", "capture.stage"),
    (assembly.Assembler, "build", "capture.build"),
    (assembly.TokenText, "decode", "capture.build"),
]
# where a CPU's rows are held and chosen from later,
HELD = [
    *ANYWHERE,
    (budget.Pace, "train", "capture.plan"),
    (held.Inputs, "copied", "capture.plan"),
    (held.HeldRows, "gather", "capture.tap"),
    (held.HeldJob, "count", "capture.stage"),
    (sampling, "choose", "capture.build"),
    (sampling, "real_tokens", "capture.build"),
    (held.HeldRows, "rows", "capture.build"),
]
# and where they are chosen from at once, as on a GPU.
AT_ONCE = [
    *ANYWHERE,
    (sampling, "choose", "capture.plan"),
    (sampling, "real_tokens", "capture.plan"),
    (tap.Slots, "plan", "capture.plan"),
    (tap.Slots, "gather", "capture.tap"),
    (planning, "to_host", "capture.stage"),
    (assembly.Job, "count", "capture.stage"),
]


def _losses(model: Any) -> list[torch.Tensor]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        ids = token_batch(2, 8, seed=step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.fixture
def _production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT")


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return _losses(make_model())


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is small enough to be held."""
    monkeypatch.setattr(planning, "MOST_TOKENS", -1)


@pytest.mark.usefixtures("_production")
@pytest.mark.parametrize(("owner", "name", "where"), HELD, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_fault_anywhere_leaves_the_losses_bitwise_equal(
    owner: Any, name: str, where: str, plain: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(owner, name, where, plain, monkeypatch)


@pytest.mark.usefixtures("_production", "_at_once")
@pytest.mark.parametrize(("owner", "name", "where"), AT_ONCE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_so_does_one_where_rows_are_chosen_at_once(
    owner: Any, name: str, where: str, plain: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(owner, name, where, plain, monkeypatch)


def _break(owner: Any, name: str, where: str, plain: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with capturing(model) as captured:
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, _fail)
            assert _same(_losses(model), plain)
            captured.capture.flush(1)
            assert captured.guard.faults[where] >= STEPS
        # And when it works again, so does the capture.
        before = captured.capture.stats.written
        with torch.no_grad():
            model(token_batch(1, 8, seed=9))
        assert captured.capture.flush(5)
        assert captured.capture.stats.written == before + 2


@pytest.mark.usefixtures("_production")
def test_a_sink_that_fails_loses_samples_visibly(plain: list[torch.Tensor]) -> None:
    def sink(_: Sequence[ActivationSample]) -> None:
        raise _InjectedError("disk")

    model = make_model()
    with capturing(model, sink=sink) as captured:
        assert _same(_losses(model), plain)
        assert captured.capture.flush(5)
        assert captured.capture.stats.dropped == {"fault": STEPS * 4}
        assert captured.guard.faults["capture.sink"] >= 1


@pytest.mark.usefixtures("_production")
def test_callbacks_that_fail_are_counted(plain: list[torch.Tensor]) -> None:
    model = make_model()
    captured = Captured(model)
    captured.capture._stager._on_sampled = _fail
    assert _same(_losses(model), plain)
    assert captured.capture.close(5)
    assert captured.guard.faults["capture.on_sampled"] == STEPS
    assert len(captured.got) == STEPS * 4


@pytest.mark.usefixtures("_production")
def test_generation_goes_on_when_matching_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    ids = token_batch(1, 5)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with capturing(model) as captured:
        captured.capture.sessions.open(AgentContext("run"), ids[0].tolist())
        monkeypatch.setattr(SessionRegistry, "view", property(_fail))
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
        assert captured.guard.faults["capture.plan"] >= 8


@pytest.mark.usefixtures("_production", "_at_once")
def test_more_forwards_in_flight_than_slots_are_dropped_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "_MAX_IN_FLIGHT", 0)
    model = make_model()
    with capturing(model) as captured, torch.no_grad():
        model(token_batch(1))
        assert captured.capture.stats.dropped == {"busy": 2}


def test_host_exceptions_pass_untouched() -> None:
    model = make_model()
    with capturing(model), torch.no_grad(), pytest.raises(IndexError, match="index out of range"):
        model(torch.full((1, 4), 10_000))


def test_random_numbers_are_not_consumed() -> None:
    model = make_model()
    torch.manual_seed(3)
    with capturing(model) as captured, torch.no_grad():
        before = torch.get_rng_state()
        model(token_batch())
        assert captured.samples()
        assert torch.equal(torch.get_rng_state(), before)


def test_default_device_and_dtype_of_the_host_do_not_matter() -> None:
    model = make_model()
    torch.set_default_dtype(torch.float64)
    try:
        with capturing(model) as captured, torch.no_grad(), torch.device("meta"):
            ids = token_batch_on_cpu()
            model(ids)
            assert len(captured.samples()) == 2
    finally:
        torch.set_default_dtype(torch.float32)


def token_batch_on_cpu() -> torch.Tensor:
    return torch.tensor([[5, 6, 7, 8]], device="cpu")


def test_time_spent_in_the_host_is_measured() -> None:
    model = make_model()
    with capturing(model) as captured, torch.no_grad():
        assert captured.capture.stats.host_seconds == 0
        model(token_batch())
        assert 0 < captured.capture.stats.host_seconds < 1

"""The benchmark harness: what is measured, in which order, what is written about it. No real clock is asserted."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    import benchmarks.harness as harness
    from benchmarks import models, report
    from benchmarks.harness import (
        DURATION,
        LATENCY,
        PEAK_MEMORY,
        Case,
        Peer,
        Reading,
        Unavailable,
        Work,
        child,
        energy,
        memory,
        noise,
        record,
        roofline,
        rotation,
        stats,
        table,
        worker,
    )
    from benchmarks.harness import nursery as nursery_module
    from benchmarks.harness.case import WrongOutput, relative_error
    from benchmarks.harness.clock import calibrate, clock_for, wall_clock
    from benchmarks.harness.nursery import Nursery
    from benchmarks.harness.runner import Measurement, Runner, round_orders
    from benchmarks.harness.seat import Local, Seat, Task
finally:
    sys.path.remove(str(ROOT))

cli = [sys.executable, "-m", "benchmarks"]


class FakeClock:
    """Time passes only where a synthetic peer says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self, body: Callable[[], object]) -> float:
        start = self.now
        body()
        return self.now - start

    def peer(self, name: str, seconds: Callable[[int], float], output: Any = 1.0, **given: Any) -> Peer:
        """`seconds(n)` is the time of the n-th call; `output` the value it returns."""
        calls = iter(range(10**9))

        def call(*inputs: Any) -> torch.Tensor:
            self.now += seconds(next(calls))
            self.log.append(name)
            return torch.as_tensor(output)

        return Peer(name, lambda: call, **given)


def run(clock: FakeClock, *peers: Peer, rounds: int = 5, **given: Any) -> dict[str, Measurement]:
    settings = {"reference": lambda *inputs: torch.tensor(1.0), "baseline": peers[0].name, **given}
    measured = Runner(rounds=rounds, clock=clock, seed=3).run(Case("case", peers, **settings))
    return {m.peer: m for m in measured}


# ---- correctness before time


def test_an_incorrect_peer_is_reported_and_not_timed() -> None:
    clock = FakeClock()
    found = run(clock, clock.peer("a", lambda n: 0.01), clock.peer("bad", lambda n: 0.001, output=1.1))
    assert clock.log.count("bad") == 1  # the check, and nothing after it
    assert (found["bad"].status, found["bad"].value, found["bad"].rounds) == ("wrong", None, 0)
    assert found["bad"].error == pytest.approx(0.1, rel=1e-5) and "tolerance" in found["bad"].reason
    assert found["a"].status == "ok" and found["a"].value == pytest.approx(0.01)


@pytest.mark.parametrize("output", [float("nan"), float("inf"), [1.0, 1.0], "text"])
def test_nan_shape_and_type_are_never_right(output: Any) -> None:
    clock = FakeClock()
    found = run(clock, clock.peer("a", lambda n: 1.0), Peer("bad", lambda: lambda: output))
    assert found["bad"].status in ("wrong", "failed") and found["bad"].value is None
    json.dumps(found["bad"].__dict__, allow_nan=False)


def test_a_peer_that_goes_wrong_while_it_is_timed_loses_its_time() -> None:
    clock, calls = FakeClock(), []

    def drift() -> torch.Tensor:
        calls.append(1)
        clock.now += 0.1
        return torch.tensor(1.0 if len(calls) < 3 else 2.0)

    found = run(clock, clock.peer("a", lambda n: 0.1), Peer("drifting", lambda: drift))
    assert found["drifting"].status == "wrong" and found["drifting"].value is None
    assert "after it was timed" in found["drifting"].reason


def test_a_peer_that_changes_its_input_is_wrong_and_harms_no_other() -> None:
    seen = []

    def honest(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        clock.now += 1.0
        return x * 2

    clock = FakeClock()
    peers = (Peer("vandal", lambda: lambda x: x.mul_(2)), Peer("honest", lambda: honest))
    found = run(clock, *peers, reference=lambda x: x * 2, inputs=lambda g: (torch.randn(3, generator=g),))
    assert found["vandal"].status == "wrong" and "changed its input" in found["vandal"].reason
    assert found["honest"].status == "ok"
    assert len({tuple(x.tolist()) for x in seen}) == 2  # the sets that were drawn, and nothing else


def test_a_peer_may_have_a_reference_of_its_own() -> None:
    clock = FakeClock()
    other = clock.peer("other", lambda n: 0.1, output=5.0, reference=lambda: torch.tensor(5.0))
    found = run(clock, clock.peer("a", lambda n: 0.1), other)
    assert found["other"].status == "ok" and found["other"].error == 0.0


def test_a_peer_that_rounds_more_has_a_tolerance_of_its_own() -> None:
    clock = FakeClock()
    bounds = {"in": 0.2, "out": 0.05, "exact": None}
    rough = [clock.peer(name, lambda n: 0.1, output=1.1, tolerance=bound) for name, bound in bounds.items()]
    found = run(clock, clock.peer("a", lambda n: 0.1), *rough)
    assert [found[name].status for name in ("in", "out", "exact")] == ["ok", "wrong", "wrong"]
    assert [found[name].tolerance for name in ("a", "in", "out")] == [1e-4, 0.2, 0.05]


def test_an_artifact_without_a_target_is_judged_by_its_like_with_one_if_that_holds_the_same_program() -> None:
    class Artifact:
        def __init__(self, *hashes: str) -> None:
            files = {f"program/{number}": {"sha256": value} for number, value in enumerate(hashes)}
            self.manifest = {"files": {**files, f"onnx/{id(self)}": {"sha256": "x"}}}

        def __call__(self, x: int) -> int:
            return x + 1

    assert models.outputs_without_target(Artifact("a", "b"), Artifact("a", "b"), 1) == 2
    for one, other in ((("a", "b"), ("a", "c")), (("a",), ("a", "b")), ((), ())):
        with pytest.raises(WrongOutput, match="another program"):
            models.outputs_without_target(Artifact(*one), Artifact(*other), 1)


def test_the_error_is_relative_to_the_largest_reference_value() -> None:
    assert relative_error({"y": torch.tensor([1.0, 10.5])}, [torch.tensor([1.0, 10.0])]) == pytest.approx(0.05)
    assert relative_error((torch.zeros(2), None), torch.zeros(2)) == 0.0
    with pytest.raises(WrongOutput, match="shapes"):
        relative_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        relative_error(torch.zeros(1), torch.tensor([float("nan")]))


# ---- peers that cannot run


def raising(error: Exception) -> Callable[[], Callable[..., Any]]:
    def prepare() -> Callable[..., Any]:
        raise error

    return prepare


def test_peers_that_cannot_run_are_rows_with_a_reason() -> None:
    clock = FakeClock()
    found = run(
        clock,
        clock.peer("a", lambda n: 0.1),
        Peer("absent", raising(ModuleNotFoundError("No module named 'peft'"))),
        Peer("no device", raising(Unavailable("needs a GPU"))),
        Peer("broken", raising(RuntimeError("it broke\nand more"))),
        clock.peer("no reference", lambda n: 0.1, reference=raising(ImportError("no peft"))),
    )
    assert [(m.status, m.reason) for m in list(found.values())[1:]] == [
        ("unavailable", "ModuleNotFoundError: No module named 'peft'"),
        ("unavailable", "needs a GPU"),
        ("failed", "RuntimeError: it broke"),
        ("unavailable", "its reference: ImportError: no peft"),
    ]
    assert found["a"].status == "ok" and clock.log.count("no reference") == 0


def test_without_a_baseline_there_is_a_time_but_no_ratio_and_no_verdict() -> None:
    clock = FakeClock()
    found = run(clock, Peer("base", raising(Unavailable("gone"))), clock.peer("b", lambda n: 0.1, limit=2.0))
    assert found["b"].value == pytest.approx(0.1) and found["b"].ratio is None
    assert found["b"].verdict == "not measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_makes_every_peer_unavailable() -> None:
    found = run(FakeClock(), FakeClock().peer("a", lambda n: 0.1), device="cuda")
    assert (found["a"].status, found["a"].reason) == ("unavailable", "no CUDA device")


def test_a_case_refuses_a_baseline_it_does_not_have_and_two_peers_of_one_name() -> None:
    peer = FakeClock().peer("a", lambda n: 0.1)
    with pytest.raises(ValueError, match="baseline 'x'"):
        Case("case", (peer,), baseline="x", reference=lambda: None)
    with pytest.raises(ValueError, match="device 'cuda:1'"):
        Case("case", (peer,), baseline="a", reference=lambda: None, device="cuda:1")
    with pytest.raises(ValueError, match="share a name"):
        Case("case", (peer, peer), baseline="a", reference=lambda: None)


# ---- order, loops, ratios


def test_every_round_has_every_peer_once_and_starts_vary() -> None:
    orders = round_orders(3, 50, seed=0)
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert {order[0] for order in orders} == {0, 1, 2}
    assert orders == round_orders(3, 50, seed=0) != round_orders(3, 50, seed=1)


def test_rounds_are_interleaved_as_ordered() -> None:
    clock = FakeClock()
    run(clock, *(clock.peer(name, lambda n: 1.0) for name in "abc"), rounds=8, metric=DURATION)
    assert clock.log[:3] == ["c", "b", "a"]  # whoever takes longest to build stands last, and begins
    timed = clock.log[3:]  # after one check each
    assert timed == ["abc"[index] for order in round_orders(3, 8, seed=3) for index in order]


def test_the_inner_loop_is_as_long_as_the_target_asks() -> None:
    clock = FakeClock()
    found = run(clock, clock.peer("slow", lambda n: 1.0), clock.peer("fast", lambda n: 1e-5))
    assert found["slow"].inner == 1 and 5000 <= found["fast"].inner <= 7500
    assert found["fast"].value == pytest.approx(1e-5)
    assert calibrate(clock, lambda: None, 1.0) == 100_000  # a clock that stands still ends the search


def test_a_long_call_has_no_other_before_it() -> None:
    """Two checks, three calls to warm up and one to calibrate, five samples with a call before each, two checks."""
    clock = FakeClock()
    found = run(clock, clock.peer("long", lambda n: 0.2), clock.peer("short", lambda n: 0.06))
    assert (clock.log.count("long"), clock.log.count("short")) == (2 + 1 + 5 + 2, 2 + 3 + 1 + 5 * 2 + 2)
    assert found["long"].samples == pytest.approx([0.2] * 5) and found["short"].samples == pytest.approx([0.06] * 5)


def test_what_can_be_loaded_again_is_between_rounds_and_untimed() -> None:
    """Every load has a speed of its own here, as sessions have by where their memory lies."""
    clock = FakeClock()
    speeds = iter([0.001, 0.002, 0.003])

    def load() -> Callable[[], torch.Tensor]:
        clock.now += 100.0
        speed = next(speeds)
        return clock.peer("again", lambda n: speed).prepare()

    fixed = clock.peer("fixed", lambda n: 0.001)
    found = run(clock, fixed, Peer("again", lambda: harness.Loaded(load)), rounds=9)["again"]
    assert found.samples == pytest.approx([0.001] * 3 + [0.002] * 3 + [0.003] * 3)
    assert found.ratio is not None and found.ratio["low"] == pytest.approx(1.0)
    assert found.ratio["high"] == pytest.approx(3.0)


def test_the_noise_meter_listens_in_every_round_and_to_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = FakeClock(), list[float]()

    def load() -> Callable[[], torch.Tensor]:
        clock.now += 100.0
        return clock.peer("again", lambda n: 0.001).prepare()

    def snapshot(workers: Any = ()) -> noise.Snapshot:
        times.append(clock.now)
        return noise.Snapshot(when=clock.now, busy=0.0, steal=0.0, total=clock.now, own=0.0)

    monkeypatch.setattr(noise, "snapshot", snapshot)
    run(clock, clock.peer("fixed", lambda n: 0.001), Peer("again", lambda: harness.Loaded(load)), rounds=9)
    spans = [end - start for start, end in zip(times[::2], times[1::2], strict=True)]
    assert len(spans) == 9 and all(0 < span < 100 for span in spans) and times[-1] - times[0] > 200


def test_what_is_long_is_not_loaded_again() -> None:
    clock, loads = FakeClock(), []

    def load() -> Callable[[], torch.Tensor]:
        loads.append(1)
        return clock.peer("again", lambda n: 0.2).prepare()

    found = run(clock, clock.peer("fixed", lambda n: 0.001), Peer("again", lambda: harness.Loaded(load)), rounds=9)
    assert found["again"].samples == pytest.approx([0.2] * 9) and loads == [1]


def test_the_one_before_goes_before_the_next_is_loaded() -> None:
    alive: list[int] = []

    class Session:
        def __init__(self) -> None:
            assert not alive
            alive.append(1)

        def __call__(self, x: float) -> float:
            return x + 1

        def __del__(self) -> None:
            alive.pop()

    found = harness.Loaded(Session)
    assert found(1) == 2
    found.again()
    assert found(1) == 2 and alive == [1]


def test_a_peer_behind_another_is_prepared_after_it() -> None:
    done: list[str] = []

    def make(name: str) -> Callable[[], Callable[..., Any]]:
        return lambda: (time.sleep(0.05 * (name == "slow")), done.append(name), lambda: None)[-1]

    peers = (Peer("waits", make("waits"), behind="slow"), Peer("free", make("free")), Peer("slow", make("slow")))
    case = Case("case", peers, baseline="free", reference=lambda: None)
    for builders, expected in ((1, ["slow", "waits", "free"]), (2, ["free", "slow", "waits"])):
        done.clear()
        Runner(quick=True, rounds=1, builders=builders).run(case)
        assert done == expected
    done.clear()  # the other is not measured
    Runner(quick=True, rounds=1, wanted=lambda name: name != "slow").run(case)
    assert done == ["free", "waits"]


def test_cases_that_belong_together_are_prepared_before_one_is_measured_and_end_one_by_one() -> None:
    log: list[str] = []

    class Sitting(Local):
        def prepare(self) -> None:
            log.append(f"prepare {self.case.name}")
            super().prepare()

        def warm_up(self, target: float) -> None:
            log.append(f"measure {self.case.name}")

    @contextlib.contextmanager
    def seats(case: Case, peers: Sequence[int], seed: int) -> Iterator[list[Seat]]:
        task = Task.of(case, seed)
        yield [Sitting(case, index, lambda: task) for index in peers]
        log.append(f"end {case.name}")

    def case(name: str, output: float) -> Case:
        peer = Peer("only", lambda: lambda: torch.tensor(output))
        return Case(name, (peer,), baseline="only", reference=lambda: torch.tensor(1.0))

    running = Runner(quick=True, rounds=1, seats=seats)
    found = [rows for rows in running.run_together([case("one", 1.0), case("two", 2.0)]) if log.append("told") is None]
    assert [(m.case, m.status) for rows in found for m in rows] == [("one", "ok"), ("two", "wrong")]
    assert log == ["prepare one", "prepare two", "measure one", "told", "end one", "told", "end two"]


def test_all_seats_are_left_where_one_case_breaks() -> None:
    left: list[str] = []

    @contextlib.contextmanager
    def seats(case: Case, peers: Sequence[int], seed: int) -> Iterator[list[Seat]]:
        if case.name == "two":
            raise OSError("no more processes")
        try:
            yield [Local(case, index, lambda: Task.of(case, seed)) for index in peers]
        finally:
            left.append(case.name)

    cases = [Case(name, (Peer("a", lambda: print),), baseline="a", reference=print) for name in ("one", "two")]
    with pytest.raises(OSError, match="no more"):
        list(Runner(seats=seats).run_together(cases))
    assert left == ["one"]


@pytest.mark.parametrize("behind", ["itself", "nobody"])
def test_a_peer_stands_behind_another_of_its_case(behind: str) -> None:
    with pytest.raises(ValueError, match=f"'itself' stands behind '{behind}'"):
        Case("case", (Peer("itself", lambda: print, behind=behind),), baseline="itself", reference=print)


def test_the_ratio_is_taken_within_each_round_so_a_slow_spell_cancels_out() -> None:
    clock = FakeClock()

    def slower_and_slower(factor: float) -> Callable[[int], float]:
        return lambda n: factor * 1.5**n

    peers = clock.peer("a", slower_and_slower(1.0)), clock.peer("b", slower_and_slower(1.25), limit=1.3)
    found = run(clock, *peers, rounds=9, metric=DURATION)
    ratio = found["b"].ratio
    assert ratio is not None and all(value == pytest.approx(1.25) for value in ratio.values())
    assert found["b"].verdict == "met" and found["a"].spread is not None and found["a"].spread["iqr"] > 1


def test_verdicts_need_the_whole_interval() -> None:
    noisy = stats.ratio([1.0, 1.2, 1.1, 0.9, 1.3, 1.0], [1.0] * 6)
    assert noisy.low is not None and noisy.high is not None and noisy.low < noisy.value < noisy.high
    assert (noisy.verdict(2.0), noisy.verdict(1.05), noisy.verdict(0.5)) == ("met", "unclear", "missed")
    assert noisy.verdict(None) is None
    assert stats.ratio([1.0, 1.0], [1.0, 1.0]).verdict(2.0) == "unclear"  # two rounds have no interval
    assert stats.ratio([2.0], [1.0], exact=True).verdict(2.0) == "met"  # what is counted has none either
    assert stats.ratio([2.1], [1.0], exact=True).verdict(2.0) == "missed"
    assert stats.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == {"iqr": 2.0, "mad": 1.0}


def test_a_quick_run_has_no_limits() -> None:
    clock = FakeClock()
    case = Case("case", (clock.peer("a", lambda n: 0.1, limit=0.5),), baseline="a", reference=lambda: torch.tensor(1.0))
    (found,) = Runner(rounds=3, clock=clock, quick=True).run(case)
    assert found.limit is None and found.verdict is None and found.value == pytest.approx(0.1)


def test_the_cuda_clock_waits_for_the_last_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait for the event")

        def elapsed_time(self, other: Event) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    assert clock_for("cuda")(lambda: log.append("body")) == 0.25  # torch counts in milliseconds
    assert log == ["synchronize", "record", "body", "record", "wait for the event"]
    assert clock_for("cpu") is wall_clock


def test_a_peer_may_measure_itself_and_each_of_its_readings_is_judged() -> None:
    readings = iter([Reading(40.0, 0.0), Reading(40.0, 0.0), Reading(40.0, 0.5)])
    constant = Peer("bytes", lambda: lambda: Reading(10.0, 0.0))
    found = run(FakeClock(), constant, Peer("b", lambda: lambda: next(readings)), metric=PEAK_MEMORY, rounds=2)
    assert found["b"].status == "wrong" and found["b"].error == 0.5 and found["b"].ratio is None
    assert found["bytes"].value == 10.0


def test_the_same_seed_gives_the_same_inputs() -> None:
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    for _ in range(2):
        clock = FakeClock()
        peer = clock.peer("a", lambda n: 1.0)
        draw: dict[str, Any] = {"inputs": lambda g: (torch.randn(4, generator=g),), "reference": keep}
        run(clock, peer, **draw, metric=DURATION, rounds=1)
    assert torch.equal(*seen)


# ---- noise


def test_work_of_others_and_stolen_time_are_told_apart_from_our_own() -> None:
    start = noise.Snapshot(when=0.0, busy=100.0, steal=1.0, total=1000.0, own=50.0)
    end = noise.Snapshot(when=10.0, busy=116.0, steal=2.0, total=1020.0, own=58.0)
    steal, others = noise.compare([(start, end)])
    assert (steal, others) == (0.05, 0.8)
    assert len(noise.reasons(1e9, steal, others)) == 3
    assert noise.reasons(0.0, 0.0, 0.0) == noise.reasons(None, None, None) == []


def test_what_happens_between_rounds_is_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [(0, 0.0), (10, 0.1), (20, 5.0), (30, 5.1)]  # most is stolen between the two rounds
    made = iter([noise.Snapshot(when=now, busy=now, steal=steal, total=2.0 * now, own=now) for now, steal in times])
    monkeypatch.setattr(noise, "snapshot", lambda workers: next(made))
    meter = noise.NoiseMeter()
    for _ in range(2):
        with meter.listening():
            pass
    found = meter.read()
    assert (found["steal"], found["others"], found["noisy"]) == (0.005, 0.0, [])


def test_work_of_a_living_child_is_our_own() -> None:
    body = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass\nprint(1); input()"
    child = subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None and child.stdout.readline()
        mine, both = noise.snapshot(), noise.snapshot([child.pid])
        child.communicate(b"\n")
    assert mine is not None and both is not None and both.own - mine.own > 0.4
    assert noise.snapshot([child.pid]) is not None  # it has ended, and is among the ended children


# ---- inputs that are rotated


def test_input_sets_lie_apart_and_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "last_level_cache", lambda device: 10_000)
    drawn = [(torch.randn(5, 7), [torch.tensor(number)], "word") for number in range(2)]
    sets, told = rotation.rotated(drawn)
    assert told == {"sets": len(sets), "bytes": len(sets) // 2 * 2 * (192 + 64), "cache": 10_000}
    assert told["bytes"] >= 20_000 and len({found[0].data_ptr() for found in sets}) == len(sets)
    for number, (x, (count,), word) in enumerate(sets):
        assert torch.equal(x, drawn[number % 2][0]) and count == number % 2 and word == "word"
        assert x.is_contiguous() and x.data_ptr() % 64 == count.data_ptr() % 64 == sets[0][0].data_ptr() % 64


def test_no_more_is_rotated_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "last_level_cache", lambda device: 2**40)
    monkeypatch.setattr(rotation, "MOST_BYTES", 4096)
    turned = torch.randn(8, 4).T
    sets, told = rotation.rotated([(turned,)])
    assert told["bytes"] == 4096 and all(x.stride() == turned.stride() and torch.equal(x, turned) for (x,) in sets)
    assert rotation.rotated([("word",)] * 2) == ([("word",)] * 2, {"sets": 2, "bytes": 0, "cache": 0})
    assert rotation.rotated([(torch.empty(0, 3),)])[1]["sets"] == 1
    monkeypatch.undo()
    assert rotation.last_level_cache(torch.device("cpu")) >= 2**15


def test_a_peer_is_called_with_all_sets_and_one_that_keeps_its_first_result_is_wrong() -> None:
    seen, kept, clock = set(), [], FakeClock()

    def honest(x: torch.Tensor) -> torch.Tensor:
        seen.add(x.data_ptr())
        clock.now += 0.01
        return x + 1

    def lazy(x: torch.Tensor) -> torch.Tensor:
        kept.append(x + 1)
        return kept[0]

    found = run(clock, Peer("honest", lambda: honest), Peer("lazy", lambda: lazy), reference=lambda x: x + 1,
                inputs=lambda g: (torch.randn(1000, 1000, generator=g),), rounds=20)  # fmt: skip
    assert found["lazy"].status == "wrong"
    assert found["honest"].inputs is not None and found["honest"].inputs["sets"] > 2
    assert len(seen) >= min(found["honest"].inputs["sets"], 20)


# ---- energy and rooflines


def test_energy_is_that_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(energy, "meter", lambda device: lambda: 50 * clock.now)  # 50 W
    found = run(clock, clock.peer("a", lambda n: 0.5), clock.peer("b", lambda n: 0.1))
    assert found["a"].energy == pytest.approx(25) and found["b"].energy == pytest.approx(5)
    monkeypatch.undo()
    assert run(clock, clock.peer("a", lambda n: 0.5), metric=DURATION)["a"].energy is None


def test_counters_of_energy_are_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.meter("cpu") is None
    for number, joules in enumerate((3, 4)):
        (tmp_path / f"intel-rapl:{number}").mkdir()
        (tmp_path / f"intel-rapl:{number}" / "energy_uj").write_text(f"{joules}000000\n")
    read = energy.meter("cpu")
    assert read is not None and read() == 7.0


def test_a_roofline_is_the_larger_of_two_times() -> None:
    known = {"copy": 1e9, "float32": 1e12}
    assert roofline.bound(Work(operations=10**12, bytes=10**6), known) == 1.0
    assert roofline.bound(Work(operations=10, bytes=2 * 10**9), known) == 2.0
    assert roofline.bound(Work(1, 1, "float64"), known) is None


def test_the_rates_of_this_machine_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "BYTES", 2**20)
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "_seconds", lambda call, device: [call(), 0.5][1])
    assert roofline.rates() == {"copy": 4.194e6, "float32": 1.049e6, "int8": 1.049e6}


def test_the_rate_of_bytes_is_that_of_products_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch's own, which may be a loop."""
    if torch.backends.mkldnn.is_available():
        monkeypatch.delattr(torch, "_int_mm")
    product = roofline._byte_product(64, "cpu")().double()
    assert product.shape == (64, 64) and product.abs().max() > 1000 and torch.equal(product, product.round())


def test_a_rate_is_the_best_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 0.5, 3.0])
    monkeypatch.setattr(roofline, "clock_for", lambda device: lambda call: next(times))
    assert roofline._seconds(lambda: None, "cpu") == 0.5


def test_the_rows_of_a_run_have_the_highest_rates_of_its_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"cpu": {"copy": 3.0, "float32": 1.0}}, {"cpu": {"copy": 2.0, "float32": 4.0}}])
    with record.Writer(path := tmp_path / "name.jsonl", shared(rates={"cpu": {"copy": 1.0, "float32": 2.0}})) as writer:
        for _ in range(2):
            writer.write(some_rows())
            monkeypatch.setattr(record, "measured", lambda: next(found))
            writer.measure_rates()
        writer.measure_rates(every=1000.0)  # has just been done
    rows = record.read(path)
    assert len(rows) == 6 and all(row["rates"] == {"cpu": {"copy": 3.0, "float32": 4.0}} for row in rows)


# ---- a process for each peer

MODULE = """
import functools, os, time
import torch
from benchmarks.harness import Case, Peer, Unavailable, Work

def absent():
    raise Unavailable(f"needs {OPTIONS.seed} more")

def busy(x):
    time.sleep(0.002)
    return x * 2

def dies_later():
    calls = []
    def call(x):
        calls.append(1)
        if len(calls) > 8:
            os.abort()
        return busy(x)
    return call

def says_why():
    print("out of luck")
    raise SystemExit(3)

def cases(options):
    global OPTIONS
    OPTIONS = options
    prepare = {"good": lambda: busy, "process": lambda: lambda x: x * 2 + 0 * os.getpid(), "absent": absent,
               "exits": says_why, "wrong": lambda: lambda x: x * 3, "dies later": dies_later}
    yield Case("other", (Peer("a", absent),), baseline="a", reference=lambda: None)
    yield Case("case", tuple(Peer(name, made) for name, made in prepare.items()), baseline="good",
               reference=lambda x: x.double() * 2, inputs=lambda g: (torch.randn(4, generator=g),),
               work=lambda: Work(os.getpid(), 2, "float64"))
    yield Case("no reference", (Peer("a", lambda: busy),), baseline="a", reference=lambda x: os.abort(),
               inputs=lambda g: (torch.zeros(1),))
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Measurement]]:
    (tmp_path / "a_benchmark.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    options = harness.Options(seed=41, quick=True)

    def measured(name: str) -> dict[str, Measurement]:
        file = importlib.import_module("a_benchmark")
        case = next(case for case in file.cases(options) if case.name == name)
        source = worker.Source("a_benchmark", options, (name, case.metric.name), threads=1, seed=3)
        with worker.nursery("a_benchmark", threads=1) as workers:
            seats = functools.partial(worker.worker_seats, source=lambda case: source, nursery=workers)
            return {m.peer: m for m in Runner(quick=True, rounds=4, seats=seats, builders=2).run(case)}

    return measured


def test_peers_run_in_processes_and_one_that_dies_is_a_row(remote: Callable[[str], dict[str, Measurement]]) -> None:
    found = remote("case")
    assert [(name, m.status) for name, m in found.items()] == [
        ("good", "ok"), ("process", "ok"), ("absent", "unavailable"), ("exits", "failed"), ("wrong", "wrong"),
        ("dies later", "failed"),
    ]  # fmt: skip
    assert found["absent"].reason == "needs 41 more"
    assert found["exits"].reason == "its process ended with status 3: out of luck"
    assert "status -6" in found["dies later"].reason and found["dies later"].value is None
    good = found["good"]
    assert good.value is not None and good.value > 0.002 and good.rounds == 4 and good.error == 0.0
    assert good.peak_memory is not None and good.peak_memory > 2**20
    assert good.inputs is not None and good.inputs["sets"] > 2
    assert good.work is not None and good.work["operations"] != os.getpid() and good.work["dtype"] == "float64"
    assert all(m.work == good.work for m in found.values())  # those too that have no time
    assert found["process"].ratio is not None and found["process"].ratio["value"] < 1  # type: ignore[operator]


def test_a_reference_that_dies_leaves_rows(remote: Callable[[str], dict[str, Measurement]]) -> None:
    assert [(m.status, m.value) for m in remote("no reference").values()] == [("failed", None)]


SERVED = """
import atexit, os, signal, time
STATE = []

def serve(pipe):
    atexit.register(print, "tidied up")
    with pipe:
        while True:
            try:
                word = pipe.recv()
            except EOFError:
                return
            STATE.append(word)
            if word == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            print(f"heard {word}", flush=True)
            pipe.send((list(STATE), os.getpid(), os.environ["OMP_NUM_THREADS"]))

def deaf(pipe):
    time.sleep(60)
"""


@pytest.fixture
def nursery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with contextlib.closing(Nursery("served", "served:serve", threads=7)) as made:
        yield made


def test_workers_are_forked_and_share_nothing(nursery: Nursery, tmp_path: Path) -> None:
    workers = [nursery.fork(tmp_path / f"{number}.log") for number in range(2)]
    for word, (pid, pipe) in zip(("one", "two"), workers):
        pipe.send(word)
        assert pipe.recv() == ([word], pid, "7")
    for number, (word, (pid, pipe)) in enumerate(zip(("one", "two"), workers)):
        pipe.close()  # and each hears it, though the other was forked beside it
        assert nursery.wait(pid, 10) == "0"
        assert (tmp_path / f"{number}.log").read_text() == f"heard {word}\ntidied up\n"


def test_a_worker_that_is_killed_harms_no_other(nursery: Nursery, tmp_path: Path) -> None:
    (dead, dying), (pid, pipe) = (nursery.fork(tmp_path / name) for name in "ab")
    dying.send("die")
    with pytest.raises(EOFError):
        dying.recv()
    assert nursery.wait(dead, 10) == "-9" and nursery.wait(pid, 0) == nursery_module.ALIVE
    assert nursery.wait(dead, 0) == nursery_module.GONE
    pipe.send("go on")
    assert pipe.recv()[0] == ["go on"]


def test_workers_end_with_those_who_asked_for_them(nursery: Nursery, tmp_path: Path) -> None:
    """The nursery hears that its line is closed, and so does a worker, whichever of them is first."""
    pid, pipe = nursery.fork(tmp_path / "log")
    pipe.send("word")
    pipe.recv()
    nursery.close()
    assert nursery.process is not None and nursery.process.returncode == 0
    pipe.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_without_a_nursery_there_are_rows_that_say_so(nursery: Nursery, tmp_path: Path) -> None:
    source = worker.Source("a_benchmark", harness.Options(), ("case", "latency"), threads=7, seed=0)
    nursery.fork(tmp_path / "log")
    os.kill(nursery.pids[0], signal.SIGKILL)
    with pytest.raises(worker.Dropped, match="has ended with status -9"):
        worker.Process(source, nursery, tmp_path / "log").ask("task")
    assert nursery.wait(1, 5) == nursery_module.GONE


def test_a_peer_that_takes_too_long_is_ended(nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.01)
    monkeypatch.setattr(nursery, "serve", "served:deaf")
    process = worker.Process(worker.Source("", None, ("", ""), threads=7, seed=0), nursery, tmp_path / "log")
    with pytest.raises(worker.Dropped, match="no answer in"):
        process.ask("task")
    monkeypatch.undo()
    monkeypatch.setattr(worker, "GRACE", 0.01)
    process.close()
    assert process.pid is not None and not Path(f"/proc/{process.pid}").exists()


def test_what_is_forked_from_computed_nothing() -> None:
    """Threads and devices do not survive a fork."""
    code = ("import os, sys, benchmarks.preloaded, torch; "
            "assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork(); "
            "assert not {'onnxruntime', 'peft', 'torch_pruning', 'fxfreeze'} & sys.modules.keys(); "
            "assert {'timm', 'transformers', 'onnxscript'} <= sys.modules.keys(); "
            "assert len(os.listdir('/proc/self/task')) == 1, os.listdir('/proc/self/task')")  # fmt: skip
    environment = os.environ | dict.fromkeys(nursery_module.THREAD_VARIABLES, "1")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


# ---- memory of a child process


def test_a_child_process_is_measured_apart_from_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        "def small():\n    return lambda: 0.0\n"
        "def big(size):\n    kept = bytearray(size)\n    return lambda: len(kept) * 0.0 + 0.25\n"
        "def freed():\n    import os\n    return lambda: float(os.environ['MALLOC_MMAP_THRESHOLD_'])\n"
        "def missing():\n    import a_package_that_is_not_there\n"
        "def broken():\n    raise OSError('no space')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ballast = bytearray(300 * 2**20)  # ru_maxrss would pass this on to the children
    reading = memory.peak_above("work:small", "work:big", size=64 * 2**20)()()
    del ballast
    assert 60 * 2**20 < reading.value < 80 * 2**20 and reading.error == 0.25
    held = memory.peak_above("work:small", "work:freed", held=True)()()
    assert held.error == 2**17  # the environment says so
    with pytest.raises(Unavailable, match="a_package_that_is_not_there"):
        memory.child("work:missing")
    with pytest.raises(RuntimeError, match="no space"):
        memory.child("work:broken")
    assert child.peak_rss() > 2**20


# ---- rows, files, tables


@pytest.fixture(autouse=True)
def _no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second to measure."""
    monkeypatch.setattr(record, "measured", lambda: {"cpu": {"copy": 1e9, "float32": 1e9}})


def shared(**changes: Any) -> record.Environment:
    made = record.environment("name", quick=True, seed=7, command="python -m benchmarks run name --quick")
    return record.Environment(**{**made.__dict__, **changes})


def some_rows() -> list[Measurement]:
    clock = FakeClock()
    peers = [clock.peer("a|b", lambda n: 0.0123), clock.peer("c", lambda n: 0.0246, limit=3.0)]
    return list(run(clock, *peers, Peer("gone", raising(Unavailable("not here")))).values())


def test_a_row_says_what_where_when_and_with_what(tmp_path: Path) -> None:
    with record.Writer(tmp_path / "new" / "name.jsonl", shared()) as writer:
        writer.write(some_rows())
    rows = record.read(tmp_path / "new" / "name.jsonl")
    assert [row["peer"] for row in rows] == ["a|b", "c", "gone"]
    wanted = {
        "case", "peer", "metric", "unit", "value", "spread", "rounds", "ratio", "baseline", "tolerance",
        "error", "machine", "versions", "git", "time", "seed", "command", "threads", "noise", "status", "reason",
    }  # fmt: skip
    assert all(wanted <= row.keys() == record.FIELDS for row in rows)
    row = rows[1]
    assert (row["metric"], row["unit"], row["seed"], row["rounds"]) == ("latency", "s", 7, 5)
    assert row["ratio"]["value"] == pytest.approx(2.0) and row["verdict"] == "met"
    assert {"cpu", "flags", "cores", "memory", "os", "gpu"} == row["machine"].keys()
    assert row["rates"] == {"cpu": {"copy": 1e9, "float32": 1e9}}
    assert row["versions"]["torch"] and row["time"].endswith("+00:00")
    assert str(ROOT) not in json.dumps(row)


def test_a_run_that_dies_leaves_the_old_file_and_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "name.jsonl"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), record.Writer(path, shared()) as writer:
        writer.write(some_rows())
        raise KeyboardInterrupt
    assert path.read_text() == "old" and len(record.read(tmp_path / "name.jsonl.partial")) == 3


def test_what_is_not_a_row_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "name.jsonl"
    good = json.dumps(record.row(some_rows()[0], shared()))
    for bad, message in (
        ("{", "line 2: not JSON"),
        ('{"case": 1}', "fields: .*versions"),
        ("3", "not an object"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(record.ResultError, match=message):
            record.read(path)
    with pytest.raises(record.ResultError, match="cannot read"):
        record.read(tmp_path / "absent.jsonl")


def test_the_table_has_a_line_for_every_row_and_a_heading_for_every_run() -> None:
    rows = [record.row(m, shared(time=time)) for time in ("2030-01-01", "2030-01-02") for m in some_rows()]
    for row in rows:
        row["noise"] = {"noisy": ["steal 3.0%"]}
    text = table.markdown(rows)
    assert text.count("| case | peer |") == 2 and "2030-01-01" in text and "2030-01-02" in text
    lines = [line for line in text.splitlines() if line.startswith("| case |") and "---" not in line]
    body = [line for line in lines if "| peer |" not in line]
    assert body[0].startswith("| case | a\\|b (baseline) | 12.3 ms ± 0")
    assert "2.000 [2.000, 2.000] | ≤ 3 met | 0.0e+00 ≤ 1e-04 | " in body[1]
    assert body[1].endswith("| 5 | noisy: steal 3.0% |")
    assert body[2].endswith("| 0 | unavailable: not here |")
    assert table.markdown([]) == ""


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = [record.row(m, shared()) for m in some_rows()]
    assert table.cells(rows)[0] == ["case", "peer", "value", "ratio [95 %]", "limit", "error ≤ tolerance",
                                    "peak memory", "rounds", "remarks"]  # fmt: skip
    rows[1] |= {"work": {"operations": 2_460_000, "bytes": 10, "dtype": "float32"}, "energy": 0.25}
    headings, lines = table.cells(rows, "case", "remarks")
    assert dict(zip(headings, lines[1])) | {
        "work": "2.46 MOP, 10 B",
        "of roofline": "10.0%",
        "energy": "250 mJ",
    } == dict(zip(headings, lines[1]))
    assert dict(zip(headings, lines[0]))["of roofline"] == ""
    assert table.reached(rows[1] | {"metric": "bytes"}) is table.reached(rows[1] | {"rates": {}}) is None


def test_the_terminal_has_a_table_for_each_case_and_remarks_below_it() -> None:
    rows = [record.row(m, shared()) for m in some_rows()]
    others = [row | {"case": "another", "noise": {"noisy": ["steal 3.0%"]}} for row in rows]
    console = Console(width=120, record=True, file=io.StringIO())
    table.draw([*rows, *others], console)
    told = [line.rstrip() for line in console.export_text().splitlines()]
    starts = [told.index("case"), told.index("another")]
    assert starts[0] == 0 and told[-1] == "  noisy: steal 3.0%" and told.count("  noisy: steal 3.0%") == 1
    assert told.count("  gone: unavailable: not here") == 2 and "remarks" not in told[1]
    assert sum("2.000 [2.000, 2.000]" in line for line in told[: starts[1]]) == 1


def test_a_difference_inside_the_spread_is_a_tie() -> None:
    assert table.ratio_cell({"value": 0.98, "low": 0.9, "high": 1.05}) == "0.980 [0.900, 1.050] tie"
    assert table.ratio_cell({"value": 0.9, "low": 0.8, "high": 0.95}) == "0.900 [0.800, 0.950]"
    assert table.ratio_cell({"value": 0.9, "low": None, "high": None}) == "0.900"


def test_quantities_choose_one_unit_for_value_and_spread() -> None:
    assert table.quantity(3 * 2**20, "B", 2**19) == "3 MiB ± 0.5"
    assert table.quantity(2e-5, "s", 1e-6) == "20 µs ± 1"
    assert table.quantity(0.5, "accuracy") == "0.5 accuracy"


# ---- the report


def latency_rows(case: str, **samples: list[float]) -> list[dict[str, Any]]:
    """A row per peer with these samples; `fxfreeze_onnx` is "fxfreeze, onnx"."""
    base = record.row(some_rows()[0], shared())
    rows = []
    for peer, values in samples.items():
        summary = {"value": stats.median(values), "samples": values, "rounds": len(values)} if values else {}
        status = {"status": "ok"} if values else {"status": "failed", "value": None, "reason": "Error: it broke"}
        rows.append(base | {"case": case, "peer": peer.replace("_", ", ")} | summary | status)
    return rows


def test_the_best_of_ours_meets_the_best_peer_and_losses_come_first() -> None:
    rows = [
        *latency_rows("won", eager=[9.0] * 5, ort=[3.0] * 5, fxfreeze_onnx=[1.5] * 5, fxfreeze_aoti=[2.0] * 5),
        *latency_rows("tied", ort=[1.0, 1.2, 0.8, 1.1, 0.9], fxfreeze_onnx=[1.0] * 5),
        *latency_rows("lost", ort=[1.0] * 5, fxfreeze_onnx=[2.0] * 5, fxfreeze_aoti=[]),
        *latency_rows("alone", ort=[1.0] * 5, fxfreeze_onnx=[]),
    ]
    found = report.duels(rows)
    assert [(duel.case, duel.verdict) for duel in found] == [("lost", "loss"), ("tied", "tie"), ("won", "win")]
    assert (found[2].ours["peer"], found[2].peer["peer"]) == ("fxfreeze, onnx", "ort")
    assert [duel.speed.value for duel in found] == [0.5, 1.0, 2.0]
    assert report.geometric_mean([0.5, 1.0, 2.0]) == pytest.approx(1.0)
    told = report.side_by_side(rows)
    assert "3 cases: 1 win, 1 tie, 1 loss" in told and "bar [0.50, 1.00, 2.00]" in told
    assert told.index("| lost |") < told.index("| tied |") < told.index("| won |")
    assert "| lost | fxfreeze, aoti | failed: Error: it broke |" in told
    assert report.side_by_side([]) == ""


def test_the_results_are_those_of_the_files(tmp_path: Path) -> None:
    assert report.FILE.read_text(encoding="utf-8") == report.text(), "run `python -m benchmarks report`"
    with record.Writer(tmp_path / "name.jsonl", shared()) as writer:
        writer.write(some_rows())
    record.replace_row(tmp_path / "run.jsonl", {"name": "a run", "ok": True, "time": "now", "command": "do"})
    (tmp_path / "run.svg").touch()
    told = report.text(tmp_path)
    assert "## name\n" in told and "| case | a\\|b (baseline) |" in told
    assert f"## run\n\n![]({tmp_path.name}/run.svg)\n\n| run |" in told and "| a run | yes | now | `do` |" in told


def test_suites_are_told_side_by_side_machine_by_machine(tmp_path: Path) -> None:
    for name in ("scale", "scale_avx2", "scaled"):
        rows = latency_rows("case", ort=[2.0] * 5, fxfreeze_onnx=[1.0] * 5)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = report.text(tmp_path)
    assert [line for line in told.splitlines() if line.endswith("side by side")] == [
        "## scale, side by side", "## scale_avx2, side by side"
    ]  # fmt: skip


# ---- git


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_revision_and_what_makes_it_dirty(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert record.git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = record.git_revision(tmp_path)
    assert clean is not None and len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "name.jsonl").write_text("{}")
    assert record.git_revision(tmp_path) == clean  # a run's own result does not make the next one dirty
    (tmp_path / "code.py").write_text("2")
    assert record.git_revision(tmp_path) == clean | {"dirty": True}
    (tmp_path / "unpacked").mkdir()
    assert record.git_revision(tmp_path / "unpacked") is None  # inside another's checkout


def test_outside_a_checkout_or_without_git_there_is_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.git_revision(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.git_revision(tmp_path) is None


# ---- the command line


def test_list_names_every_benchmark_without_importing_it() -> None:
    done = subprocess.run([*cli, "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("compile_time", "peak_memory", "folded_lora", "gate_modes"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "no benchmark is named 'nothing'"),
        (["table", "absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = subprocess.run([*cli, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_public_names_are_there() -> None:
    assert all(hasattr(harness, name) for name in harness.__all__) and LATENCY.looped and not DURATION.looped


@pytest.mark.parametrize(("name", "count"), [("tversky_gpu", 6), ("sparse_gpu", 8), ("quantized_gpu", 16)])
def test_the_gpu_benchmarks_say_what_the_kernels_must_compute(monkeypatch, name, count):
    """Run on a CPU, where the operators are the same and the times mean nothing."""
    file = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(file, "DEVICE", "cpu")
    found = [m for case in file.cases(harness.Options(quick=True)) for m in Runner(quick=True, rounds=1).run(case)]
    assert [m.status for m in found] == ["ok"] * count


def test_the_sparse_benchmark_lets_as_many_neurons_fire_as_it_says():
    from benchmarks import sparse_ffn

    size = sparse_ffn.Size(64, 1000, 200, 0.1)
    model = sparse_ffn.layer(size, seed=0)
    x = sparse_ffn.draw_decided(model, torch.empty(size.batch, size.width), torch.Generator().manual_seed(0))
    assert (model.fired(x) != 0).double().mean() == pytest.approx(0.1, abs=0.005)
    h, wide = model.up(x), model.double().up(x.double())
    assert torch.equal(h > model.threshold, wide > model.threshold)


def test_the_benchmark_of_blocks_has_as_many_empty_ones_as_it_says():
    from benchmarks import block_sparse
    from fxfreeze.kernels.block_sparse import filled

    for empty in (0.5, 0.75, 0.9):
        weight = block_sparse.layer(block_sparse.Size(1024, 1, empty), seed=0).weight
        assert int(filled(weight, 64, 64).sum()) == 256 - round(256 * empty)
    assert [str(size) for size in block_sparse.FULL if size.is_limited] == [
        f"{width} to {width}, batch 64, 75% empty" for width in (1024, 2048, 4096)
    ]


def test_a_layer_that_stays_dense_is_no_peer(monkeypatch):
    """In the tests every clock says that the dense product is as fast."""
    from benchmarks import block_sparse

    size = block_sparse.Size(512, 2, 0.75)
    with pytest.raises(
        harness.Unavailable, match="the layer stays dense: 75% zeros; size only: no speed-up, since with"
    ):
        block_sparse.frozen_layer(lambda: block_sparse.layer(size, seed=0), size, "torch")

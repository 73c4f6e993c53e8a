"""fxfreeze.kernels._triton: which config a launcher takes. Nothing runs: the kernel and the tuner are stand-ins."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")


CONFIGS = ({"BN": 64, "num_warps": 4}, {"BN": 32, "num_warps": 8, "num_stages": 2})


class Launched:
    """Stands in for a kernel or a tuner: notes grids and arguments."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((grid, arguments))


@pytest.fixture
def tuners(monkeypatch):
    """Every tuner that was made: its configs, its key, and itself."""
    made = []

    def autotune(configs, key):
        made.append((configs, key, Launched()))
        return lambda kernel: made[-1][2]

    monkeypatch.setattr(triton, "autotune", autotune)
    return made


def grid(meta):
    return (meta["BN"],)


def test_the_interpreter_takes_the_first_config(tuners):
    from fxfreeze.kernels._triton import tuned

    kernel = Launched()
    tuned(kernel, CONFIGS, key=("P",))(grid, size=3, P=5)
    assert kernel.calls == [((64,), {"P": 5, "BN": 64, "num_warps": 4})]
    assert tuners == []


def test_a_gpu_tunes_once_per_power_of_two(tuners, monkeypatch):
    from fxfreeze.kernels import _triton

    monkeypatch.setattr(_triton, "interpreted", lambda kernel: False)
    launch = _triton.tuned(Launched(), CONFIGS, key=("P",))
    for size in (9, 16, 12, 17):
        launch(grid, size=size, P=5)
    assert [len(tuner.calls) for _, _, tuner in tuners] == [3, 1]
    configs, key, tuner = tuners[0]
    assert key == ["P"] and tuner.calls[0] == (grid, {"P": 5})
    assert [(config.kwargs, config.num_warps) for config in configs] == [({"BN": 64}, 4), ({"BN": 32}, 8)]
    assert configs[1].num_stages == 2


def test_what_the_interpreter_makes():
    from fxfreeze.kernels._semiring import semiring_kernel
    from fxfreeze.kernels._triton import interpreted

    assert interpreted(semiring_kernel) == triton.knobs.runtime.interpret

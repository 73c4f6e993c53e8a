"""The rig itself: what it must not let pass."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fxfreeze.kernels import _semiring

pytestmark = pytest.mark.slow

TYPES = {
    **dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32"), "threshold": "fp32",
    **dict.fromkeys(("N", "P", "K", "stride_ak", "stride_bk", "stride_cn"), "i32"),
}  # fmt: skip
CONSTANTS = {"stride_an": 1, "stride_bp": 1, "COMBINE": "min", "REDUCE": "sum", "START": 0.0, "MASK": True,
             "BN": 64, "BP": 64}  # fmt: skip


def test_what_is_not_declared(within_budget):
    with pytest.raises(AssertionError, match=r"cuda:80: nothing declared; measured \{'registers': "):
        within_budget("no such row", _semiring.semiring_kernel, TYPES, CONSTANTS)


def test_what_costs_more(within_budget):
    with pytest.raises(AssertionError, match=r"cuda:90: registers \d+, declared at most"):
        within_budget("semiring min sum 64x64", _semiring.semiring_kernel, TYPES, {**CONSTANTS, "BN": 128, "BP": 128})


def test_what_spills(within_budget):
    with pytest.raises(AssertionError, match=r"cuda:80: spills [1-9]\d*, declared at most 0"):
        within_budget("semiring min sum 64x64", _semiring.semiring_kernel, TYPES, CONSTANTS, maxnreg=32)


def test_tensor_cores_that_are_not_declared(within_budget):
    with pytest.raises(AssertionError, match=r"hip:gfx942: tensor_cores 0, declared [1-9]"):
        within_budget("tiled product bfloat16 64x64x32", _semiring.semiring_kernel, TYPES, CONSTANTS)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("assert False", "1 failed"),
        ("pytest.skip('no')", "1 skipped"),
        ("import os; assert os.environ['TRITON_INTERPRET'] != '1'", "1 failed"),
    ],
)
def test_the_interpreter_tells(interpreter, tmp_path, body, reason):
    file = tmp_path / "test_it.py"
    file.write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    with pytest.raises(AssertionError, match=reason):
        interpreter(str(file))


def test_the_interpreter_counts(interpreter, tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("import pytest\n@pytest.mark.gpu\ndef test_it():\n    pass\ndef test_other():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    assert interpreter(str(file)) == 1

"""What quantizing each layer alone does to a model: where accuracy goes, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SiteSensitivity:
    """One layer quantized, and all others in floats.

    Attributes:
        site: its module path.
        step: the plan's step that names it.
        scheme: what was tried, such as "int8".
        snr: of the layer's own result, in dB; None: it did not change.
        output_snr: of the model's outputs, in dB, the worst of them; None: they did not change.
        stays: share of predictions that stay, the worst of the outputs'; None: no output looks like one.
        drop: by how much the score of ``evaluate`` falls; None: there was none.
        gain: its share of what the step can save: of the layers' time in floats for "int8", else of the bytes of their
            weights.
        chosen: what the layer became: a scheme, or "float" where a budget keeps it so.
    """

    site: str
    step: str
    scheme: str
    snr: float | None
    output_snr: float | None
    stays: float | None
    drop: float | None
    gain: float
    chosen: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ranked(rows: Iterable[SiteSensitivity]) -> list[SiteSensitivity]:
    """The most sensitive first: by the score, then by the noise in the outputs."""
    return sorted(rows, key=lambda row: (-(row.drop or 0.0), row.output_snr is None, row.output_snr or 0.0))

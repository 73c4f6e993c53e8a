"""The folder of a ticket search: what is done lies there, each part written whole or not at all.

``search.json``: the settings that may not change. ``seed-0/rewound.safetensors``: W_k.
``seed-0/level-03.mask.safetensors`` and ``level-03.trained.safetensors``: of the ticket. ``level-03.ticket.json``,
``….reinit.json``, ``….random.json``: a run that is done, with its score; written last, so a run without one did not
happen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import weights
from .errors import ArtifactError, PlanError
from .masks import density, read_mask, write_mask
from .plan import write_file
from .tickets_masks import Masks, prune_smallest
from .tickets_run import Key, Outcome, State

FORMAT = 1
"""Version of the layout of the folder; a newer one is refused."""

KIND = "fxfreeze.weights"


@dataclass(frozen=True)
class Run:
    """A run that is done: `density` is the share of weights left in the layers that are pruned, `score` what `evaluate`
    said."""

    kind: str
    seed: int
    level: int
    density: float
    score: float
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What the runs in a folder have in common."""

    steps: int
    rewind_to: int
    fraction: float
    exclude: tuple[str, ...]


class Store:
    """Reads and writes the folder of a search.

    Raises:
        ArtifactError: a file in it is damaged, or of a newer layout.
        PlanError: it cannot be written to, or its runs were made with other settings.
    """

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.folder = folder
        if settings is not None:
            self._claim(settings)
        self.settings = self._settings()

    def _claim(self, settings: Settings) -> None:
        """Write the settings, or find the same there."""
        if not (self.folder / "search.json").exists():
            data = {"format": FORMAT, **asdict(settings)}
            write_file(self.folder / "search.json", _json(data), "settings")
            return
        found = asdict(self._settings())
        if differing := [key for key, value in asdict(settings).items() if found[key] != value]:
            words = "; ".join(f"{key} was {found[key]}, not {getattr(settings, key)}" for key in differing)
            raise PlanError(
                f"the folder holds a search of other settings: {words}", where=str(self.folder),
                hint="name another folder, or the settings of before",
            )  # fmt: skip

    def _settings(self) -> Settings:
        data = self._read(self.folder / "search.json")
        if data.get("format") != FORMAT:
            raise ArtifactError(f"a search of format {data.get('format')}; this fxfreeze reads {FORMAT}",
                                where=str(self.folder))  # fmt: skip
        try:
            return Settings(data["steps"], data["rewind_to"], data["fraction"], tuple(data["exclude"]))
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"search.json is damaged: {error!r}", where=str(self.folder)) from None

    def clean(self) -> None:
        """Remove what a killed process left half written. Only for the process that holds the folder."""
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob("seed-*/.*.tmp")]:
            leftover.unlink(missing_ok=True)

    # ------------------------------------------------------------------ paths

    def rewound_path(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / "rewound.safetensors"

    def mask_path(self, seed: int, level: int) -> Path:
        return self._level(seed, level, "mask.safetensors")

    def trained_path(self, seed: int, level: int) -> Path:
        return self._level(seed, level, "trained.safetensors")

    def _row_path(self, key: Key) -> Path:
        return self._level(key.seed, key.level, f"{key.kind}.json")

    def _level(self, seed: int, level: int, rest: str) -> Path:
        return self.folder / f"seed-{seed}" / f"level-{level:02d}.{rest}"

    # ------------------------------------------------------------------ runs

    def has(self, key: Key) -> bool:
        """Whether the run is done."""
        return (self.rewound_path(key.seed) if key.kind == "rewind" else self._row_path(key)).exists()

    def save(self, key: Key, outcome: Outcome) -> None:
        """Keep a run; what says that it is done comes last."""
        try:
            (self.folder / f"seed-{key.seed}").mkdir(exist_ok=True)
        except OSError as error:
            raise PlanError(f"cannot be written to: {error.strerror}", where=str(self.folder)) from None
        if key.kind == "rewind":
            assert outcome.masks is not None
            write_mask(self.mask_path(key.seed, 0), outcome.masks, {"seed": str(key.seed), "level": "0"})
            weights.write(self.rewound_path(key.seed), outcome.state, _about(key))
            return
        assert outcome.score is not None
        if key.kind == "ticket":
            weights.write(self.trained_path(key.seed, key.level), outcome.state, _about(key))
        share = density(self.masks(key.seed, key.level))
        row = Run(key.kind, key.seed, key.level, share, outcome.score, round(outcome.seconds, 3))
        write_file(self._row_path(key), _json(asdict(row)), "result")

    def row(self, key: Key) -> Run:
        """The result of a run that is done."""
        path = self._row_path(key)
        try:
            row = Run(**self._read(path))
        except TypeError as error:
            raise ArtifactError(f"damaged: {error}", where=str(path)) from None
        if Key(row.kind, row.seed, row.level) != key:  # type: ignore[arg-type]
            raise ArtifactError("the file was renamed: it holds another run", where=str(path))
        return row

    def rewound(self, seed: int) -> State:
        return weights.read(self.rewound_path(seed))[0]

    def trained(self, seed: int, level: int) -> State:
        return weights.read(self.trained_path(seed, level))[0]

    def masks(self, seed: int, level: int) -> Masks:
        """The mask of a level: from its file, or from the trained weights of the level before, and then kept."""
        path = self.mask_path(seed, level)
        if path.exists():
            return read_mask(path)
        masks = prune_smallest(self.trained(seed, level - 1), self.masks(seed, level - 1), self.settings.fraction)
        write_mask(path, masks, {"seed": str(seed), "level": str(level)})
        return masks

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"there is no search here: {path.name} is missing", where=str(self.folder)) from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"damaged: {error}", where=str(path)) from None
        if not isinstance(data, dict):
            raise ArtifactError("damaged: no JSON object", where=str(path))
        return data


def _about(key: Key) -> dict[str, str]:
    return {"format": KIND, "version": "1", "run": key.kind, "seed": str(key.seed), "level": str(key.level)}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()

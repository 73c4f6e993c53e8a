"""What fxfreeze raises: every error says what went wrong, where it is, and what to do about it."""

from __future__ import annotations


class FxfreezeError(Exception):
    """Base of all errors that fxfreeze raises on purpose.

    what:  the problem in one sentence; may span several lines when several problems are reported at once.
    where: the place the user knows: a module path (`layer1.0.conv1`), a file, a key of a plan.
    line:  the source line behind it, such as `model.py:12, y = x.item()` or `line 3, column 5`.
    hint:  what to do next.
    """

    def __init__(
        self, what: str, *, where: str | None = None, line: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)  # only `what`, so that copying and pickling rebuild the error from args and __dict__
        self.what = what
        self.where = where
        self.line = line
        self.hint = hint

    def __str__(self) -> str:
        text = self.what
        if self.where and self.line:
            text += f"\n  at {self.where} ({self.line})"
        elif self.where or self.line:
            text += f"\n  at {self.where or self.line}"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        return text


class PlanError(FxfreezeError):
    """A plan, or one of its parts, is malformed or asks for the impossible."""


class CaptureError(FxfreezeError):
    """The model could not be turned into a Program."""


class PassError(FxfreezeError):
    """A pass broke its contract, or refused a site it was asked to rewrite."""


class ProofError(FxfreezeError):
    """A rewrite declared exact changed the function, or a lossy one exceeded its bound."""


class ArtifactError(FxfreezeError):
    """An artifact could not be written, loaded or trusted."""


class EmitError(ArtifactError):
    """A target's compiler refused the lowered program, or its result disagrees with the frozen model."""


class MissingDependencyError(FxfreezeError):
    """An optional package is needed for what was asked; the hint names the extra to install."""

"""fxfreeze: a compiler for frozen neural networks.

>>> plan = Plan(inputs=[Input("image", shape=("batch", 3, 32, 32))], steps=[LoRA(at="layer*.conv*", rank=4)])
>>> net = adapt(model, plan)              # only the adapter trains
>>> artifact = compile(net, plan)         # folded, proven, emitted, compared with the frozen model
>>> artifact.save("out")
"""

from __future__ import annotations

from ._version import __version__
from .adapt import AdaptedModule, adapt
from .api import compile, sensitivity
from .artifact import Artifact, load
from .diagnose import Diagnosis, diagnose_prunability
from .errors import (
    ArtifactError,
    CaptureError,
    EmitError,
    FxfreezeError,
    MissingDependencyError,
    PassError,
    PlanError,
    ProofError,
)
from .merging import fold_checkpoint
from .plan import (
    IA3,
    OFT,
    BayesCap,
    Bottleneck,
    Codebook,
    Dim,
    DiReFT,
    DoRA,
    Factorize,
    Gate,
    Head,
    Input,
    LoRA,
    LoReFT,
    Plan,
    Prefix,
    Prompt,
    Prune,
    Quantize,
    Replace,
    Splice,
    Tap,
    Tversky,
    VeRA,
    from_adapterhub,
    from_peft,
)
from .sensitivity import SiteSensitivity
from .tickets import Ticket, Tickets, find_ticket

__all__ = [
    "IA3",
    "OFT",
    "AdaptedModule",
    "Artifact",
    "ArtifactError",
    "BayesCap",
    "Bottleneck",
    "CaptureError",
    "Codebook",
    "DiReFT",
    "Diagnosis",
    "Dim",
    "DoRA",
    "EmitError",
    "Factorize",
    "FxfreezeError",
    "Gate",
    "Head",
    "Input",
    "LoRA",
    "LoReFT",
    "MissingDependencyError",
    "PassError",
    "Plan",
    "PlanError",
    "Prefix",
    "Prompt",
    "ProofError",
    "Prune",
    "Quantize",
    "Replace",
    "SiteSensitivity",
    "Splice",
    "Tap",
    "Ticket",
    "Tickets",
    "Tversky",
    "VeRA",
    "__version__",
    "adapt",
    "compile",
    "diagnose_prunability",
    "find_ticket",
    "fold_checkpoint",
    "from_adapterhub",
    "from_peft",
    "load",
    "sensitivity",
]

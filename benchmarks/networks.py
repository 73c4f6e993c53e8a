"""Networks people use, bare and with everything a plan can do to them, against the libraries that do the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from .harness import LATENCY, Case, Options
from .suite import plans, work
from .suite.networks import Network, networks
from .suite.peers import OURS, peer
from .suite.plans import Variant

SUITE = "cpu"
METRIC = replace(LATENCY, rounds=9, quick_rounds=5)
"""There are 70 cases, and most of their time goes into building what is measured."""
ONNX, AOTI, TORCH = OURS
RIVALS: dict[Variant, tuple[str, ...]] = {
    plans.BARE: ("ONNX Runtime", "eager", "torch.compile", "torch.compile, freezing", "AOTInductor"),
    plans.LORA: ("peft merged, ONNX Runtime", "peft merged, torch.compile, freezing", "peft, eager"),
    plans.GATES: ("ONNX Runtime", "torch.compile, freezing"),
    plans.TVERSKY: ("ONNX Runtime", "eager"),
    plans.TICKET: ("Torch-Pruning, ONNX Runtime", "ONNX Runtime"),
    plans.QUANTIZED: ("quantize_static", "torchao", "NNCF, ONNX Runtime"),
    plans.ALL: ("merged by hand, quantize_static", "torch.compile, freezing", "eager"),
}
"""What competes in each variant; the first, which is the best in practice, is the baseline."""
PANEL: dict[Variant, tuple[str, ...]] = {
    plans.BARE: ("eager", "torch.compile", "AOTInductor"),
    plans.LORA: ("peft merged, torch.compile, freezing", "peft, eager"),
    plans.TVERSKY: ("eager",),
    plans.QUANTIZED: ("NNCF, ONNX Runtime",),
    plans.ALL: ("eager",),
}
"""Left out where not all compete: they were never the fastest of a case when every network had all of them, but for
AOTInductor on the panel itself."""
SLOW: dict[Variant, tuple[str, ...]] = {plans.ALL: ("torch.compile, freezing",)}
"""Left out of large networks, too: it computes in floats what others do in 8 bits."""
UNREAD = {plans.QUANTIZED: ("torchao",)}
"""Left out where linear layers are transformers' Conv1D: these stay in floats, and take 3 times as long."""
WHOLE = {plans.TICKET: ("ONNX Runtime",)}
"""Left out of large networks where the baseline knows the layers: what it removes is computed."""
SMALL, LARGE = (0, 0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2, 2)
"""Which variants of a network are prepared at a time: of large ones fewer, whose processes have 2 to 4 GiB each."""
QUICK = (plans.BARE, plans.LORA, plans.QUANTIZED, plans.ALL)


def cases(options: Options) -> Iterator[Case]:
    for network in networks(options):
        groups = LARGE if network.large else SMALL
        for number, variant in enumerate(QUICK if options.quick else plans.VARIANTS):
            yield replace(network_case(network, variant, options.quick), together=f"{network.title} {groups[number]}")


def network_case(network: Network, variant: Variant, quick: bool = False) -> Case:
    names = (RIVALS[variant][:1] if quick else rivals(network, variant)) + ours(network, variant, quick)
    return Case(
        name=f"{network.title}, {variant.name}",
        peers=tuple(peer(name, network, variant, names) for name in names),
        baseline=names[0],
        reference=functools.partial(plans.reference, network, variant),
        inputs=network.draw,
        tolerance=variant.tolerance(network),
        metric=METRIC,
        work=functools.partial(work.of, network, variant),
        folder=network.folder,
    )


def rivals(network: Network, variant: Variant) -> tuple[str, ...]:
    left_out = () if network.panel else PANEL.get(variant, ())
    if network.large:
        left_out += SLOW.get(variant, ()) + (UNREAD if network.transposed else WHOLE).get(variant, ())
    return tuple(name for name in RIVALS[variant] if name not in left_out)


def ours(network: Network, variant: Variant, quick: bool) -> tuple[str, ...]:
    """ONNX Runtime, and what may be faster: AOTInductor's packages for convolutions with windows or on integers, and
    where one row meets gates or a head; torch.compile for a BERT with gates, where a CPU of Intel was faster by it."""
    if quick:
        return (ONNX,)
    integers = variant.int8 and network.convolutional
    single = variant in (plans.GATES, plans.TVERSKY) and network.single
    if network.windows or integers or single:
        return ONNX, AOTI
    return (ONNX, TORCH) if variant == plans.GATES and network.name == "BERT-base" else (ONNX,)

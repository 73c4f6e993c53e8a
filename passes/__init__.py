"""The pipeline, top to bottom: the order of everything fxfreeze does between capture and emission.

A new pass is its file, its test, and its line here.
"""

from __future__ import annotations

from fxfreeze.rewrite import Pass

from .adapt.delta import InsertDelta
from .adapt.gate import InsertGates
from .adapt.prefix import InsertPrefix
from .adapt.prompt import InsertPrompt
from .adapt.prune import InsertMasks
from .adapt.selected import InsertSelected
from .adapt.splice import InsertSplice
from .adapt.tap import InsertTaps
from .adapt.tversky import InsertTversky
from .clean.attention import FourDimAttention
from .clean.common import CommonSubexpressions
from .clean.constants import FoldConstants, FoldLateConstants
from .clean.gates import RecogniseGates
from .clean.noops import StripLateNoOps, StripNoOps
from .clean.parameters import ReplaceParameters
from .clean.shapes import ExplicitShapes
from .clean.wrapped import FoldWrapped
from .fold.affine import FoldAffine
from .fold.codebook import FoldCodebook
from .fold.delta import FoldDelta
from .fold.gate import FoldGate
from .fold.row_constants import DropRowConstants
from .fold.selected import FoldSelected
from .fold.tversky import FoldTversky
from .freeze.harden import Harden
from .freeze.masks import FoldMasks
from .fuse.block_sparse import BlockSparse
from .fuse.gated_linear import FuseGatedLinear
from .fuse.parallel import MergeParallel
from .fuse.quantized_gate import FuseQuantizedGate
from .fuse.selected import SelectForm
from .fuse.semi_structured import SemiStructured
from .fuse.sparse_down import SparseDown
from .lower.gates import InlineGates
from .lower.merge import MergeConstants
from .lower.round import Round
from .lower.selected import InlineSelected
from .prune.compact import Compact
from .prune.dead_neurons import DeadNeurons
from .prune.factorize import FactorizeLayers
from .prune.unread_rows import UnreadRows
from .quantize.dynamic import QuantizeDynamic, QuantizeDynamicWithin
from .quantize.equalize import Equalize
from .quantize.float8 import QuantizeFloat8, QuantizeFloat8Within
from .quantize.products import QuantizeProducts, QuantizeProductsWithin
from .quantize.static import QuantizeStatic, QuantizeStaticWithin
from .quantize.tied import MergeTied
from .quantize.tversky import QuantizeTversky, QuantizeTverskyWithin
from .quantize.weights import QuantizeWeights, QuantizeWeightsWithin

PIPELINE: tuple[Pass, ...] = (
    # clean: the parameters the plan gives, and what means nothing to a frozen graph
    ReplaceParameters(),
    ExplicitShapes(),
    StripNoOps(),
    FoldWrapped(),
    CommonSubexpressions(),
    FoldConstants(),
    FourDimAttention(),
    RecogniseGates(),
    # adapt: put the plan's adapters in; a prompt first, since it changes the shapes that the others look at
    InsertPrompt(),
    InsertPrefix(),
    InsertTversky(),
    InsertSelected(),
    InsertDelta(),
    InsertSplice(),
    InsertGates(),
    InsertMasks(),
    InsertTaps(),
    # freeze: what only trains
    StripLateNoOps(),
    Harden(),
    FoldMasks(),
    # fold: one operator where the model, or an adapter, has several; in float64
    FoldDelta(),
    FoldSelected(),
    FoldTversky(),
    DropRowConstants(),
    FoldLateConstants(),
    FoldGate(),
    FoldAffine(),
    FoldCodebook(),
    # prune: what no input can reach, what hardly adds to predictions, and what no output reads; rows last, as neurons
    # are found by what follows gates
    DeadNeurons(),
    Compact(),
    FactorizeLayers(),
    UnreadRows(),
    # quantize: integers, or float8, for what is left, once its channels are alike; what has a budget last, for it
    # counts the rest
    Equalize(),
    QuantizeStatic(),
    QuantizeProducts(),
    QuantizeTversky(),
    QuantizeDynamic(),
    QuantizeFloat8(),
    QuantizeWeights(),
    QuantizeStaticWithin(),
    QuantizeProductsWithin(),
    QuantizeTverskyWithin(),
    QuantizeDynamicWithin(),
    QuantizeFloat8Within(),
    QuantizeWeightsWithin(),
    MergeTied(),
    # fuse: one call where a compiler sees several; what skips neurons looks for their gate, and so comes first; what is
    # in a stack is found by nobody
    SparseDown(),
    BlockSparse(),
    SemiStructured(),
    FuseQuantizedGate(),
    FuseGatedLinear(),
    MergeParallel(),
    SelectForm(),
    # lower: plain operators, and constants as they are stored
    InlineGates(),
    InlineSelected(),
    MergeConstants(),
    Round(),
)

"""What a backward shows: squared norms of gradient samples, on one process, DDP and FSDP2 alike."""

from anybatch._gradients.autograd import check_no_backward, check_not_captured
from anybatch._gradients.engine import Engine, engine_of
from anybatch._gradients.gather import Gather
from anybatch._gradients.join import Companion
from anybatch._gradients.layers import Layers
from anybatch._gradients.metric import Metric
from anybatch._gradients.norms import SquaredNorms
from anybatch._gradients.parameters import (
    check_in_use,
    is_phantom,
    trainable,
    trained_parameters,
    withheld,
)
from anybatch._gradients.reduce import Flight, Observation, Ranks, Reduction, Share, check_same, divisor_of, launch
from anybatch._gradients.sizes import Sizes

__all__ = [
    "Companion",
    "Engine",
    "Flight",
    "Gather",
    "Layers",
    "Metric",
    "Observation",
    "Ranks",
    "Reduction",
    "Share",
    "Sizes",
    "SquaredNorms",
    "check_in_use",
    "check_no_backward",
    "check_not_captured",
    "check_same",
    "divisor_of",
    "engine_of",
    "is_phantom",
    "launch",
    "trainable",
    "trained_parameters",
    "withheld",
]

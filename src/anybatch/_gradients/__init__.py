"""Norms of the gradients of each backward, the same on one process, under DDP and under FSDP2."""

from anybatch._gradients.adam_metric import AdamNorms
from anybatch._gradients.autograd import check_no_backward, check_not_captured
from anybatch._gradients.deepspeed import DeepSpeedHooks, deepspeed_engine, is_deepspeed
from anybatch._gradients.engine import Engine, engine_of
from anybatch._gradients.euclidean import EuclideanNorms
from anybatch._gradients.finite import finite
from anybatch._gradients.hooks import GradientHooks
from anybatch._gradients.join import JoinSupport
from anybatch._gradients.layers import LayerNorms
from anybatch._gradients.parameters import check_in_use, entries_of, is_phantom, trainable, trained_parameters
from anybatch._gradients.pipeline import PipelineHooks, is_pipeline, pipeline_engine, stages_of
from anybatch._gradients.probe import Probe
from anybatch._gradients.reduce import Ranks, ReducedWindow, Reduction, Share, check_same, divisor_of, reduce_window
from anybatch._gradients.sizes import Sizes
from anybatch._gradients.steps import Handle, Steps
from anybatch._gradients.window import PAIR, Norms

__all__ = [
    "PAIR",
    "AdamNorms",
    "DeepSpeedHooks",
    "Engine",
    "EuclideanNorms",
    "GradientHooks",
    "Handle",
    "JoinSupport",
    "LayerNorms",
    "Norms",
    "PipelineHooks",
    "Probe",
    "Ranks",
    "ReducedWindow",
    "Reduction",
    "Share",
    "Sizes",
    "Steps",
    "check_in_use",
    "check_no_backward",
    "check_not_captured",
    "check_same",
    "deepspeed_engine",
    "divisor_of",
    "engine_of",
    "entries_of",
    "finite",
    "is_deepspeed",
    "is_phantom",
    "is_pipeline",
    "pipeline_engine",
    "reduce_window",
    "stages_of",
    "trainable",
    "trained_parameters",
]

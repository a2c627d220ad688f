"""The model average."""

from anybatch._ema.decay import cosine_decay, half_life
from anybatch._ema.foreign import warn_of_foreign_average
from anybatch._ema.importers import ema_state_from
from anybatch._ema.model_ema import ModelEMA

__all__ = [
    "ModelEMA",
    "cosine_decay",
    "ema_state_from",
    "half_life",
    "warn_of_foreign_average",
]

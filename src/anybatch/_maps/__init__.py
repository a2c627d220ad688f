"""Every hyperparameter at another batch size, before or during a run."""

from anybatch._maps.maps import Change, scale_hyperparameters
from anybatch._maps.progressive import Progressive
from anybatch._maps.rescale import scale_optimizer

__all__ = ["Change", "Progressive", "scale_hyperparameters", "scale_optimizer"]

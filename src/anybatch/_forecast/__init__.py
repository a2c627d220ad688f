"""Steps, time and cost of a run at other batch sizes, from one record."""

from anybatch._forecast.forecast import Forecast, forecast
from anybatch._forecast.steps import Estimate

__all__ = [
    "Estimate",
    "Forecast",
    "forecast",
]

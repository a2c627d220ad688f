"""A Transformer encoder for speech: a convolution that halves the frames, then layers of self-attention, for CTC."""

import torch
from torch import Tensor, nn

from recipes.speech.model import BINS, CHARACTERS, steps
from recipes.translation.model import Layer, sinusoids


class SpeechTransformer(nn.Module):
    """Features to log-probabilities of characters, as `DeepSpeech2`; what is padding has no influence on anything.

    Args:
        width: of the residual stream.
        layers: how many.
        heads: of the attention.
        inner: width of the layers' perceptrons.
        dropout: in the layers.
    """

    def __init__(
        self, *, width: int = 512, layers: int = 12, heads: int = 8, inner: int = 2048, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.first = nn.Conv1d(BINS, width, 7, stride=2, padding=3)
        self.layers = nn.ModuleList(Layer(width, heads, inner, cross=False, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, len(CHARACTERS) + 1)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[steps, B, labels]` and numbers of steps `[B]`, of features `[B, frames, BINS]`."""
        x, lengths = self.first(features.transpose(1, 2)).relu().transpose(1, 2), steps(lengths)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = x + sinusoids(x.shape[1], x.shape[2], device=x.device)
        for layer in self.layers:
            x = layer(x, allowed=real[:, None])
        return self.out(self.norm(x)).log_softmax(2).transpose(0, 1), lengths

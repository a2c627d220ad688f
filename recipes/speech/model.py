"""Deep Speech 2 (Amodei et al. 2016, arXiv 1512.02595): spectrogram, convolutions, recurrent layers, CTC.

Differs from the paper in
    1. Five recurrent layers of 800 gated units (GRU), as is usual for LibriSpeech: 41 million parameters.
    2. The sequence-wise normalisation stands between the layers, not after a layer's input weights, so that torch's GRU
       serves.
    3. Greedy decoding, without a language model.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

SAMPLE_RATE = 16_000
WINDOW, HOP = 320, 160  # 20 ms and 10 ms
BINS = WINDOW // 2 + 1
FLOOR = 1e-3  # the magnitude that the rounding of 16-bit audio has at most in a window
CHARACTERS = "' abcdefghijklmnopqrstuvwxyz"
BLANK = 0  # character number i has label i + 1


def spectrogram(audio: Tensor) -> Tensor:
    """Log magnitudes `[frames, BINS]` of audio `[samples]` in [-1, 1]: mean 0 and variance 1 over the utterance."""
    window = torch.hamming_window(WINDOW, periodic=False)
    padded = nn.functional.pad(audio, (WINDOW // 2, WINDOW // 2))
    magnitude = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True).abs()
    log = (magnitude + FLOOR).log().T
    return (log - log.mean()) / (log.std() + 1e-5)


def frames(samples: int) -> int:
    """Frames that `spectrogram` makes of so many samples."""
    return 1 + samples // HOP


def steps(length: Tensor) -> Tensor:
    """Outputs of the model for so many frames: the first convolution halves them."""
    return (length + 1) // 2


class DeepSpeech2(nn.Module):
    """Features to log-probabilities of characters; what is padding has no influence on anything.

    Args:
        channels: of each of the two convolutions.
        hidden: units of each direction of a recurrent layer.
        layers: recurrent layers.
    """

    def __init__(self, *, channels: int = 32, hidden: int = 800, layers: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, (41, 11), stride=(2, 2), padding=(20, 5), bias=False)
        self.second = nn.Conv2d(channels, channels, (21, 11), stride=(2, 1), padding=(10, 5), bias=False)
        self.convolution_norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(2))
        width = channels * ((BINS + 3) // 4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers))
        self.recurrent = nn.ModuleList(
            nn.GRU(width if i == 0 else hidden, hidden, bidirectional=True) for i in range(layers)
        )
        self.out = nn.Linear(hidden, len(CHARACTERS) + 1, bias=False)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[steps, B, labels]` and numbers of steps `[B]`.

        Args:
            features: `[B, frames, BINS]`; padding is zeros.
            lengths: frames of each, `[B]`.
        """
        x, lengths = features.transpose(1, 2).unsqueeze(1), steps(lengths)
        real = torch.arange((features.shape[1] + 1) // 2, device=x.device) < lengths[:, None]
        for convolution, norm in zip((self.first, self.second), self.convolution_norms, strict=True):
            x = self._normalised(convolution(x), norm, real)
        x = x.flatten(1, 2).permute(2, 0, 1)
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        for layer, norm in zip(self.recurrent, self.norms, strict=True):
            both = layer(packed)[0]
            packed = _with_data(both, norm(both.data.unflatten(1, (2, -1)).sum(1)))  # the two directions are added
        packed = _with_data(packed, self.out(packed.data).log_softmax(1))
        return pad_packed_sequence(packed)[0], lengths

    @staticmethod
    def _normalised(x: Tensor, norm: nn.Module, real: Tensor) -> Tensor:
        """Batch norm and a clipped ReLU over the real steps of `[B, channels, bins, steps]`; zeros elsewhere."""
        x = x.permute(0, 3, 1, 2)
        out = torch.zeros_like(x)
        out[real] = norm(x[real]).clamp(0, 20)
        return out.permute(0, 2, 3, 1)


def _with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def greedy(log_probs: Tensor, lengths: Tensor) -> list[str]:
    """The text of the most probable label at each step of `[steps, B, labels]`: repeats are one, blanks none."""
    best = log_probs.argmax(2).T.tolist()
    texts = []
    for labels, length in zip(best, lengths.tolist(), strict=True):
        kept = [a for a, b in zip(labels[:length], [BLANK, *labels], strict=False) if a not in (b, BLANK)]
        texts.append("".join(CHARACTERS[label - 1] for label in kept))
    return texts


def edit_distance(a: list[str], b: list[str]) -> int:
    """The least number of insertions, deletions and replacements that make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]

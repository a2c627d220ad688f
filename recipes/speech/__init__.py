"""LibriSpeech with Deep Speech 2."""

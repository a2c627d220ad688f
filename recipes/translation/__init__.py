"""WMT with the Transformer."""

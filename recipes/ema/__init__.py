"""The experiments of the EMA paper."""

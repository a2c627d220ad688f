"""Adapters to training frameworks, one module for each; import the module by name."""

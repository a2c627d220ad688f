"""Adapters to the frameworks that train for their users; each is a module of its own, imported by name."""

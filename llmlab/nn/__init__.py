"""Layers whose parameters carry logical axis names; import each from its own file."""

"""Whole models assembled from the layers of `llmlab.nn`, one file per architecture family."""

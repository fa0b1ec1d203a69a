"""Evaluation: what a trained model is worth beyond its loss on the rows that it was trained to fill."""

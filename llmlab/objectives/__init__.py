"""Losses as functions of arrays. They know no model, optimizer or mesh."""

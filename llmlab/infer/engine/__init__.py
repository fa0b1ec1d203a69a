"""The engine: many requests on one model at once, their keys and values in shared blocks of memory."""

"""Metrics: logits and labels in, measurement rows out. One file a family, NumPy only, never torch."""

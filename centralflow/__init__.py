"""Predict full-batch training at the edge of stability by its central flow."""

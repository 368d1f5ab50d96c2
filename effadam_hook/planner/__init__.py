"""Predict a step: methods by name, what travels, how buckets overlap, and what is measured for it."""

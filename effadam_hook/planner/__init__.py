"""Prediction of step times: methods by name, traffic, timeline of the buckets, and measurements."""

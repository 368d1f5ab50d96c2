"""The contents of payloads: quantizers, layouts, shares, names and counters, without torch."""

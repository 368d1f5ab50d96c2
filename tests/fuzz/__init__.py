"""Randomised tests: cases drawn from seeds, run on real ranks, checked against the invariants."""

"""The exchange: who sends which bytes to whom, in which order. The only package that calls collectives."""

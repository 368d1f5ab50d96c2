"""Who sends which bytes to whom, and in which order: the only place that calls collectives."""

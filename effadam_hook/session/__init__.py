"""One model's exchange: opened between the ranks, fed with buckets, counted. Knows no DDP."""

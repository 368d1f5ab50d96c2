"""FSDP2 as a caller of the exchange: its reduce-scattered shards, averaged between replicas."""

"""The session: the exchange of one model, without DDP. Its connection, its buckets, their buffers."""

"""The exchange: senders, receivers and order of all bytes. No other package calls collectives."""

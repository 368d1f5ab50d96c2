"""Notice ranks that wait for one another in vain, find the reason, and report it on every rank."""

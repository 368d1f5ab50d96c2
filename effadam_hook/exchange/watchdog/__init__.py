"""The watchdog: ranks that wait in vain, the reason, and its report on every rank."""

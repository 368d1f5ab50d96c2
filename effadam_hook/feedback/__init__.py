"""Error feedback by parameter: residuals, and the saved state of a rank."""

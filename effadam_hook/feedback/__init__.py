"""What has not been sent yet, by parameter: residuals, and what is saved of them."""

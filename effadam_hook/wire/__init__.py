"""What travels: quantizers, layouts and names. Integers and strings, no torch."""

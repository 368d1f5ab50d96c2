"""The version of the package and of what it puts on the wire and into files."""

__version__ = "0.2.0"

PAYLOAD_VERSION = 2
"""Changes whenever the bytes of a payload change their meaning."""

STATE_VERSION = 2
"""Changes whenever the contents of a saved state change their meaning."""

"""Check this project on a machine with a GPU, in minutes; see ``__main__.py``."""

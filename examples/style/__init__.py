"""Parts of `style_transfer.py`: images, features and the reshuffle loss."""

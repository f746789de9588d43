"""Which training images influenced a generated image, and how sure are we: records and pure functions."""

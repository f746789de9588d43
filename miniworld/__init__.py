"""A small procedural image world: scenes, artists, captions and the concepts exemplars are drawn from."""

"""Layers, one a file, each a pure function of one device's arrays inside `shard_map`."""

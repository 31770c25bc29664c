"""Data: the miniature world, tar shards with an index, an order that no layout changes, the loader."""

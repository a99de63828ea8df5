"""`megasora data encode`: settings (no heavy import), plan (pure), record (cache.json), maker (shards), run."""

"""All that knows targets: what is supported, masks, the cache, passes."""

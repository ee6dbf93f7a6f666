"""One call of `generate`: draft, verify, accept, keep, draft on."""

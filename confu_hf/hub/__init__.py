"""A pair on disk and on the Hub: its one reader and writer."""

"""The layout of a pair on disk and on the Hub."""

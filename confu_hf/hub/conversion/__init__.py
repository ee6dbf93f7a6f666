"""EAGLE-3 drafts of other projects, in and out: one file per format, `layer.py` for what they share, `formats.py` the list."""

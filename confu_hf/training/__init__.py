"""Beside decoding: learns a draft and its adapter from what the target says."""

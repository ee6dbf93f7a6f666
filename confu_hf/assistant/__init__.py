"""What meets the user: the assistant, the route into decoding, the checks before it."""

"""Makes the same computation cheaper."""

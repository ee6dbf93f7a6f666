"""Pure index work on draft trees."""

"""The mini world: rendered data sets with every factor known, and the small zoo trained on them."""

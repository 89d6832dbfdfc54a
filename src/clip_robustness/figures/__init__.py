"""The figures: one file a figure, each a function from tidy tables to a matplotlib figure."""

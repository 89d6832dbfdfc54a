"""The tidy table that wings hand on: one row a measurement, the same columns wherever it was measured."""

# What was measured (metric, slice), of which model on which data set, its value with a 95 % interval, the number
# of images behind it, the convention it was measured by, and whose measurement it is.
MEASUREMENT = (
    *("study", "model", "dataset", "metric", "slice", "value", "low", "high"),
    *("n", "convention", "source"),
)
# What makes a row one of its kind within a study.
KEY = ("model", "dataset", "metric", "slice", "convention", "source")

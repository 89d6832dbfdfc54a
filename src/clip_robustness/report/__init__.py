"""The report: captions with their numbers filled in, and one self-contained page a study."""

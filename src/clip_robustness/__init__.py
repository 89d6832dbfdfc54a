"""clip_robustness: how robust are CLIP models? A Snakemake workflow and the package behind its rules.

Every rule calls one verb of the command line: ``python -m clip_robustness VERB --help``.
"""

__version__ = "0.1.0"

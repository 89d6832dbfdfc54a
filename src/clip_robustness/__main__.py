import gc
import sys

from clip_robustness.cli import main

code = main()
gc.freeze()  # the process ends: nothing is worth a collection
sys.exit(code)

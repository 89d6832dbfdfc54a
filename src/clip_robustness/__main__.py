import sys

from clip_robustness.cli import main

sys.exit(main())

"""python -m jaxrlhf.train --config FILE [key.path=value ...]: the same as `jaxrlhf train`."""

import sys

from jaxrlhf.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m jaxrlhf.train --config FILE [key.path=value ...]: the same as `jaxrlhf train`."""

from jaxrlhf.distributed.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import sys

from jaxrlhf.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

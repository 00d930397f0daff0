"""What torchrun starts: `tuwen train`, in each process.

torchrun --nproc-per-node 2 -m training training/recipes/muge.toml --set optim.chunk_size=64
"""

import sys

from tuwen.cli import main

if __name__ == "__main__":
    sys.argv = ["tuwen", "train", *sys.argv[1:]]
    main()

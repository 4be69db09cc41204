"""`hf-jd reward` as a script, for `accelerate launch` and `torchrun`.

accelerate launch --num_processes 2 scripts/reward.py --config reward.yaml --output_dir runs/reward
"""

import sys

from hf_jd.cli import main

if __name__ == "__main__":
    sys.exit(main(["reward", *sys.argv[1:]]))

"""`hf-jd kto` as a script, for `accelerate launch` and `torchrun`.

accelerate launch --num_processes 2 scripts/kto.py --config kto.yaml --output_dir runs/kto
"""

import sys

from hf_jd.cli import main

if __name__ == "__main__":
    sys.exit(main(["kto", *sys.argv[1:]]))

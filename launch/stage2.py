"""Train the second stage (512 px in the paper's recipe) of a run.

deepspeed launch/stage2.py                                       # configs/pixelgen_xxl.yaml
deepspeed launch/stage2.py --config configs/demo.yaml --model.depth 4
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.process import main
from launch.train import train

if __name__ == "__main__":
    main(lambda: train(__doc__, only=1))

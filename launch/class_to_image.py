"""Train a class-conditional model, every stage of its run that is not done yet.

deepspeed launch/class_to_image.py --config configs/pixelgen_xl.yaml
deepspeed launch/class_to_image.py --config configs/baselines/jit_repa.yaml     # a row of the paper's Table 5
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.process import main
from launch.train import train

if __name__ == "__main__":
    main(lambda: train(__doc__, only=None, default_config="configs/pixelgen_xl.yaml"))

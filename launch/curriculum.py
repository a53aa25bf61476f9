"""Train every stage of a run that is not done yet.

deepspeed launch/curriculum.py --config configs/demo.yaml
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.process import main
from launch.train import train

if __name__ == "__main__":
    main(lambda: train(__doc__, only=None))

"""Train every stage of a run that is not done yet.

deepspeed launch/curriculum.py --config configs/demo.yaml
"""

from launch.process import main
from launch.train import train

if __name__ == "__main__":
    main(lambda: train(__doc__, only=None))

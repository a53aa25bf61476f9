"""Train the third stage (fine-tuning in the paper's recipe) of a run.

deepspeed launch/stage3.py                                       # configs/pixelgen_xxl.yaml
deepspeed launch/stage3.py --config configs/demo.yaml --model.depth 4
"""

from launch.process import main
from launch.train import train

if __name__ == "__main__":
    main(lambda: train(__doc__, only=2))

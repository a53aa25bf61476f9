"""The proving ground: GenEval's tasks on scenes of drawn shapes, judged by a detector without learned weights."""

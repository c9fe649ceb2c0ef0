"The reward that verl loads from this file."
from m2kit.train.configs import compute_score

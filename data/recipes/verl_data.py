"Writes train.parquet and val.parquet. Arguments: the folder, and a file of tasks (JSON lines) or nothing for the synthetic clinic."
import sys
from m2kit.train.configs import recipe_tasks, write_verl_data

if __name__ == "__main__": print(*write_verl_data(sys.argv[1], recipe_tasks(*sys.argv[2:3])))

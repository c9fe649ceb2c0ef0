"GRPO by equation 2 on TRL; see --help."
from m2kit.train.configs import recipe_arguments, train_recipe

if __name__ == "__main__": train_recipe(recipe_arguments().parse_args())

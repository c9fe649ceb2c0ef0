"Solutions of lesson 4, one block for each exercise."

# %% exercise 1
def my_advantages(rewards):
    "A list of numbers; `None` where a reward is unknown."
    known = [r for r in rewards if r is not None]
    mean = sum(known) / len(known)
    return [0. if r is None else r - mean for r in rewards]

# %% exercise 2
def my_gain(ratio, advantage, eps_low=.2, eps_high=.28):
    "What one token adds to equation 2."
    clipped = min(max(ratio, 1 - eps_low), 1 + eps_high)
    return min(ratio*advantage, clipped*advantage)

# %% exercise 3
def is_silent(ratio, advantage, eps_low=.2, eps_high=.28):
    "Whether the gradient of this token's gain is 0."
    too_high = advantage > 0 and ratio > 1 + eps_high
    too_low = advantage < 0 and ratio < 1 - eps_low
    return advantage == 0 or too_high or too_low

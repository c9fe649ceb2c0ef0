"Solutions of lesson 11, one block for each exercise."

# %% exercise 1
from statistics import mean, stdev
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

def interval(values):
    "(low, high) for 2 to 10 values."
    half = T[len(values)]*stdev(values)/len(values)**.5
    return mean(values) - half, mean(values) + half

# %% exercise 2
def my_verdict(low, high, margin):
    "What the interval says."
    if high <= margin: return "refuted"
    return "reproduced" if low > 0 else "cannot tell"

# %% exercise 3
def stopped_happy(values):
    "True where some look, from three seeds on, finds the interval above 0."
    return any(t_interval(values[:n])[0] > 0 for n in range(3, len(values) + 1))

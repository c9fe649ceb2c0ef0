"Solutions of lesson 9, one block for each exercise."

# %% exercise 1
def my_nearest(weights, bits):
    "The weights that the codes stand for, as a list."
    low, high = -2**(bits - 1), 2**(bits - 1) - 1
    step = 2*max(abs(w) for w in weights)/(high - low)
    codes = [min(max(round(w/step), low), high) for w in weights]
    return [c*step for c in codes]

# %% exercise 2
def tokens_that_fit(free_bytes, layers, kv_heads, head_dim, size):
    "The longest text that a cache of `free_bytes` holds, in tokens."
    return int(free_bytes // (2*layers*kv_heads*head_dim*size))

# %% exercise 3
from itertools import product
from math import ceil, floor

def best_rounding(weights, inputs):
    "The pair of whole numbers with the smallest output error."
    choices = list(product(*((floor(w), ceil(w)) for w in weights)))
    def off(codes): return sum(sum((c - w)*x for c, w, x in zip(codes, weights, row))**2 for row in inputs)
    return min(choices, key=off)

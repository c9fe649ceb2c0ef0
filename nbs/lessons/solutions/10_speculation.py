"Solutions of lesson 10, one block for each exercise."

# %% exercise 1
def after_refusal(p, q):
    "The target's distribution, without what the draft has said already."
    missing = np.maximum(p - q, 0)
    return missing/missing.sum() if missing.sum() > 0 else p

# %% exercise 2
def expected_tokens(share, K):
    "Between 1 and K + 1."
    return sum(share**k for k in range(K + 1))

# %% exercise 3
def best_length(share, check, step):
    "A whole number from 0 (do not speculate) to 12."
    return max(range(13), key=lambda K: expected_tokens(share, K)/(1 + check*K + K*step))

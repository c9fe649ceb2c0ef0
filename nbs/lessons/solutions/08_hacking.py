"Solutions of lesson 8, one block for each exercise."

# %% exercise 1
def mentions(text): return [c.item for c in read_clauses(text) if c.kind == "treatment"]

def mended(text, wanted):
    "A share in [0, 1]."
    named = set(mentions(text))
    good, needless = len(named & set(wanted)), len(named - set(wanted))
    return max(0, good - needless)/len(wanted)

# %% exercise 2
def kept_up(score, witness):
    "The witness's gain over the score's rise; None where the score has not risen."
    rise = score[-1] - score[0]
    return (witness[-1] - witness[0])/rise if rise > 0 else None

# %% exercise 3
trainings = random.Random(4).sample(["collapse-101", "forgetting-101", "hacking-101", "healthy-3"], 4)
named = dict(A="forgetting", B="healthy", C="entropy collapse", D="reward hacking")

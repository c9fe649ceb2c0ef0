"Solutions of lesson 2, one block for each exercise."

# %% exercise 1
import json

def my_reading(text, field):
    "True, False, or None for a reply that does not say clearly."
    try: told = json.loads(text)
    except ValueError: return None
    value = told.get(field) if isinstance(told, dict) else None
    return value if isinstance(value, bool) else None

# %% exercise 2
def my_bounds(points, met):
    "(lowest, highest) score; `met` holds True, False or None for each criterion."
    best = sum(p for p in points if p > 0)
    sure = sum(p for p, m in zip(points, met) if m)
    open_ = [p for p, m in zip(points, met) if m is None]
    lowest = (sure + sum(p for p in open_ if p < 0)) / best
    highest = (sure + sum(p for p in open_ if p > 0)) / best
    return lowest, highest

# %% exercise 3
def agreement_of(items, given, right, positive=None):
    "Share of known verdicts that agree; of positive criteria only, of negative ones only, or (None) of all."
    pairs = [(g.met, r.met) for (_, _, rubric), gs, rs in zip(items, given, right) for c, g, r in zip(rubric, gs, rs)
             if g.met is not None and positive in (None, c.positive)]
    return sum(g == r for g, r in pairs) / len(pairs)

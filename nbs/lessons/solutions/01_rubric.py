"Solutions of lesson 1, one block for each exercise."

# %% exercise 1
def my_score(points, met):
    "Points of the criteria that are met, over the points of the positive ones."
    earned = sum(p for p, m in zip(points, met) if m)
    best = sum(p for p in points if p > 0)
    return earned / best

# %% exercise 2
from m2kit.rubrics.rubric import DIMENSIONS
sore_throat = Rubric("sore throat", [
    Criterion(4, "Asks whether swallowing or breathing is difficult", "consultation logic"),
    Criterion(3, "Explains that most sore throats are caused by viruses and pass within a week", "diagnostic accuracy"),
    Criterion(3, "Says which signs mean that a doctor must be seen at once", "medical ethics and safety"),
    Criterion(-6, "Promises antibiotics without an examination or a test", "treatment rationality")])

# %% exercise 3
def penalty_for(best, share):
    "The mildest penalty that leaves a full answer of `best` points at most `share` of its score."
    return next((p for p in range(-1, -11, -1) if (best + p) / best <= share), None)

"Solutions of lesson 5, one block for each exercise."

# %% exercise 1
from m2kit.simulator.gate import normal

def my_gate(turns, max_turns=20, repeats=3):
    'Why it ends: "repetition", "budget", or "" when it goes on; `turns` are the doctor\'s, the last one last.'
    lately = [normal(t) for t in turns[-2*repeats:]]
    if lately.count(normal(turns[-1])) >= repeats: return "repetition"
    return "budget" if len(turns) >= max_turns else ""

# %% exercise 2
def gives_away(secret, reply):
    "Whether the reply holds the secret, letter by letter and digit by digit."
    bare = lambda text: "".join(c for c in text.lower() if c.isalnum())
    return bare(secret) in bare(reply)

# %% exercise 3
final_diagnosis = "My diagnosis is gout."
farewell = "That is all for today."
names_an_illness = "We must think of herpes simplex among other things."

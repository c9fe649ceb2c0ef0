"Solutions of lesson 7, one block for each exercise."

# %% exercise 1
def answer_only(text):
    "What the patient reads."
    thinking, answer = part_thinking(text)
    return answer or ""

# %% exercise 2
def fair_reward(texts):
    "One number in [0, 1] for each text."
    return [graded(text) for text in answers_in(texts)]

# %% exercise 3
def note_loss(nats, counts):
    "Nats a learned token."
    learned = [n for n, c in zip(nats, counts) if c]
    return sum(learned)/len(learned) if learned else 0

"Solutions of lesson 6, one block for each exercise."

# %% exercise 1
def missed_most(report, n=3):
    "The texts of the n most valuable positive criteria that were not met."
    missed = sorted(report.items(False, True), key=lambda c: -c.points)
    return [c.text for c in missed[:n]]

# %% exercise 2
my_questions = ["How can I help you?", "Have you noticed one sided rash?", "Have you noticed tingling before rash?",
                "Is there anything in your medical history?"]

# %% exercise 3
my_plan = ["We should do clinical skin examination.", "We should do viral swab PCR.",
           "I want to treat you with oral aciclovir.", "I recommend paracetamol with codeine.", "I recommend gabapentin.",
           "Come back at once if there is a rash near the eye, a severe headache with fever, or facial weakness.",
           "Keep the rash covered.", "You have shingles."]

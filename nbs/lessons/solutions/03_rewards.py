"Solutions of lesson 3, one block for each exercise."

# %% exercise 1
def my_bonus(scores, lengths, coef=4., quantile=.2, thresh=.5):
    "The bonus of every answer of a group; a list or an array of numbers."
    scores, lengths = np.asarray(scores, float), np.asarray(lengths, float)
    p80 = np.quantile(scores, quantile)
    return np.where((scores >= p80) & (p80 > thresh), coef/np.sqrt(lengths), 0.)

# %% exercise 2
def break_even(length, loss, coef=4.):
    "The length, in tokens, at which the bonus makes up for the loss."
    return (1/length**.5 + loss/coef)**-2

# %% exercise 3
four_scores = [.9, .8, .7, .4]

"""How things look: tables, figures, notebooks; knows no science."""

# in the metadata of a notebook's outputs: what its report opens with, what it folds away
HEADLINE, KEY, FOLDED = "headline", "key_figure", "folded"

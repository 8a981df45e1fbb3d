"""How things look: tables, figures, notebooks; knows no science."""

HEADLINE, KEY = "headline", "key_figure"  # in the metadata of a notebook's outputs: what its report opens with

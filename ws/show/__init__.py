"""How things look: tables, figures, notebooks; knows no science."""

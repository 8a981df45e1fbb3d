"""Which part of w carries the behaviour: w restricted to a subspace, against subspaces that hold as much of it. (method 8)"""

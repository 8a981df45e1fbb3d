"""Delta SVD: what each block adds to the residual stream. (docs/method.md section 9)"""

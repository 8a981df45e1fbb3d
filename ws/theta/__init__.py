"""Theta fit: per-user vectors on the last hidden state. (docs/method.md section 10)"""

"""Gradients of the base model on training texts: where fine-tuning would move the weights, before anything is trained."""

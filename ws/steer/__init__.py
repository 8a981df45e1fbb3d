"""Steering a model by a weight diff, and how much of the behaviour it shows then."""

from ws.steer.weights import weight_steer

__all__ = ["weight_steer"]

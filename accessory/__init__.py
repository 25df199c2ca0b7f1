"""Finetune Mixtral-class Mixture-of-Experts models in two interchangeable parallel layouts."""

__version__ = "0.1.0"

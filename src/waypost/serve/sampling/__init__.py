"""How the next token is drawn from a row of logits, and when a request ends."""

from waypost.serve.sampling.draw import Ask, Draw, Likeliest, sample
from waypost.serve.sampling.grammar import Grammar
from waypost.serve.sampling.params import Sampling

__all__ = ["Ask", "Draw", "Grammar", "Likeliest", "Sampling", "sample"]

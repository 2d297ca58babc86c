"""Adapters for evaluation harnesses, none of which is installed with this package.

EleutherAI's harness: python -m qwen2_rs.evaluation --model qwen2_rs --model_args pretrained=PATH
OpenCompass: `from qwen2_rs.evaluation.opencompass import Qwen2, Qwen2Chat` in a config
"""

from qwen2_rs.evaluation.scoring import Evaluator, Likelihood

__all__ = ["Evaluator", "Likelihood"]

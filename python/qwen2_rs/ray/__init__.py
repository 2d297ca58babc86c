"""Qwen2 on a Ray cluster, for those who outgrow one machine.

`generate` answers a column of a dataset of Ray Data, with a model in each of its actors; `qwen2_rs.ray.serve`
is a deployment of Ray Serve: serve run qwen2_rs.ray.serve:build_app source=Qwen/Qwen2-0.5B-Instruct
"""

from qwen2_rs.ray.data import Answers, generate

__all__ = ["Answers", "generate"]

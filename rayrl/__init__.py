"""Reinforcement learning for image captioning on Ray and vLLM.

Importing this package imports neither torch, ray nor vllm.
"""

__version__ = "0.1.0"

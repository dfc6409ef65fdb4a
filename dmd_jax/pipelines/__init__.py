"""Pipelines: prompts to conditions, latents to videos, and the files of both.

`sampling` draws videos of prompts, `precompute` embeds prompts and encodes videos before training;
`streaming` makes latents without an end, `video_stream` their frames; `wan` and `digits` are the
pipelines, `text`, `prompts`, `clips` and `video` what they read. Imports rollouts and the rooms
below.
"""

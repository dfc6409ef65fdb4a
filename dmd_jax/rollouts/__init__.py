"""How samples are drawn from networks, in training and in inference.

backward_simulation    a few-step generator in training: the exit step, `Rollout`
phased                 a few-step generator in phases, whose calls are Euler steps
self_forcing           a causal generator in training, block by block; `recache` for a new prompt
block_maker            one block of a causal video, in training and in a stream
blocks                 how the frames of a video divide into blocks
ode                    a teacher in Euler steps
block_ode              a causal teacher in Euler steps, block by block
teacher_forcing        every block of a video at once, after the real blocks before it
samplers               few or many steps in inference, for whole sets of samples

Imports the rooms below.
"""

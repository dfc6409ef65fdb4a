"""How samples are drawn from networks, in training and in inference.

backward_simulation    a few-step generator in training: the exit step, `Rollout`
ode                    a teacher in Euler steps
teacher_forcing        every block of a video at once, after the real blocks before it
samplers               few or many steps in inference, for whole sets of samples

Imports the rooms below.
"""

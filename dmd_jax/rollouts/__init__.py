"""How samples are drawn from networks, in training and in inference.

backward_simulation    a few-step generator in training: the exit step, `Rollout`
ode                    a teacher in Euler steps
samplers               few or many steps in inference, for whole sets of samples

Imports the rooms below.
"""

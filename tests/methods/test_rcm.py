"""rCM: the sum of DMD's loss and sCM's, with the metrics of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import gaussian_flow, normal

from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.rcm import RCM
from dmd_jax.methods.scm import SCM
from dmd_jax.models.attention import Causal

KEY = jax.random.key(5)
METHOD = RCM((2,), times=(1.0, 0.5), guidance=2.0, consistency=0.25, warmup=0, time_mean=0.3)
NETS = {"teacher": gaussian_flow(0.3, 0.6), "fake_score": gaussian_flow(0.1, 0.8)}


def batch(n):
    cond = jnp.full(n, 0.5)
    data = 0.8 + 0.6 * normal(0, n, 2)
    steps = jnp.full(n, 10)
    return {"data": data, "cond": cond, "uncond": 0 * cond, "index": jnp.arange(n), "step": steps}


@jax.jit
def all_losses(student):
    """(loss and gradient) of rCM and of its two parts, and rCM's metrics."""
    parts = DMD((2,), times=(1.0, 0.5), guidance=2.0), SCM((2,), guidance=2.0, warmup=0)
    parts = parts[0], dataclasses.replace(parts[1], time_mean=0.3)
    keys = KEY, KEY, jax.random.fold_in(KEY, 1)
    results = []
    for method, key in zip((METHOD, *parts), keys, strict=True):

        def loss(student, method=method, key=key):
            return method.generator_loss(student, NETS, batch(16), key)

        results.append(jax.value_and_grad(loss, has_aux=True)(student))
    (_, (observed, rollout)), _ = results[0]
    return [(loss, grad) for (loss, _), grad in results], METHOD.metrics(observed), rollout.x0


def test_the_loss_is_that_of_dmd_and_a_share_of_scms():
    student = gaussian_flow(0.2, 0.9, jumps=True)
    (both, matching, consistency), metrics, x0 = all_losses(student)
    for i in range(2):
        sums = jax.tree.map(lambda a, b: a + 0.25 * b, matching[i], consistency[i])
        wanted, found = jax.tree.leaves(sums), jax.tree.leaves(both[i])
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert all(np.abs(x) > 1e-4 for x in jax.tree.leaves(consistency[i]))
    assert x0.shape == (16, 2)
    assert metrics["map/residual"] > 0 and metrics["critic/tracking"] > 0


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match=r"consistency=0\.0 must be above 0"):
        RCM((2,), consistency=0.0)
    with pytest.raises(ValueError, match="warmup=-1 must be"):
        RCM((2,), warmup=-1)
    with pytest.raises(ValueError, match="sCM is for students that make a sample at once"):
        RCM((6, 4, 4, 3), video=SelfForcing(Causal(2)))

"""One file a method: which losses it takes, at which times, on which rollout."""

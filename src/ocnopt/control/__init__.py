"""The optimal-control core: players, recording, Bellman pass, rollouts."""

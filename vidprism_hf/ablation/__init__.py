"""Studies of the head on cached frame features: `study.Study`, `vidprism ablate` (extra `ablate`)."""

"""The proof, on the user's own machine, that results do not depend on how work is partitioned."""

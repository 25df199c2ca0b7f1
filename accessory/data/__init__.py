"""From a YAML mix to batches: records -> template -> tokens and labels -> deterministic order."""

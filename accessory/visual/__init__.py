"""From images to the features that a decoder takes: images -> views -> encoders -> features."""
